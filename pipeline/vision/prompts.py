"""Prompt templates: what a candidate name is put into before the text encoder reads it."""

from collections.abc import Sequence

from pipeline.runtime.errors import UserError
from pipeline.vision.weights import PICO

TEMPLATE_SETS = {  # of open_clip, for ImageNet
    "openai": "OPENAI_IMAGENET_TEMPLATES",
    "simple": "SIMPLE_IMAGENET_TEMPLATES",
}


def templates(model: str, chosen: Sequence[str] = ()) -> tuple[str, ...]:
    """Prompts for a word, `{}` in its place: the chosen, of TEMPLATE_SETS all; or what fits.

    pico-clip saw bare words in training: on 5,000 of the CIFAR-10 test pictures it is right
    for 76 % with "{}", for 69 % with "a photo of a {}."; on as many of CIFAR-100 for 45 % and 36 %.
    """
    if not chosen:
        return ("{}",) if model == PICO else ("a photo of a {}.",)
    import open_clip  # as in `weights`: where it is needed

    prompts: list[str] = []
    for name in chosen:
        fill = getattr(open_clip, TEMPLATE_SETS[name]) if name in TEMPLATE_SETS else ()
        prompts += [each("{}") for each in fill] if fill else [name]
    return tuple(dict.fromkeys(prompts))


def check_templates(chosen: Sequence[str]) -> None:
    """Raises UserError for what is neither a prompt nor a set of them."""
    for template in chosen:
        if template not in TEMPLATE_SETS and template.count("{}") != 1:
            raise UserError(
                f"caption.templates: {template!r} must hold {{}} exactly once, or be one of "
                f"open_clip's sets: {', '.join(TEMPLATE_SETS)}"
            )
