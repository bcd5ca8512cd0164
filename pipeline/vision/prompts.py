"""Prompt templates, into which a word is put before the text encoder reads it."""

from collections.abc import Sequence

from pipeline.runtime.errors import UserError
from pipeline.vision.weights import PICO

TEMPLATE_SETS = {  # of open_clip, for ImageNet
    "openai": "OPENAI_IMAGENET_TEMPLATES",
    "simple": "SIMPLE_IMAGENET_TEMPLATES",
}


def templates(model: str, chosen: Sequence[str] = ()) -> tuple[str, ...]:
    """Prompts with `{}` for the word: `chosen`, with the sets of TEMPLATE_SETS expanded.

    The default depends on the model. pico-clip was trained on bare words: on 5,000 CIFAR-10 test
    images its accuracy is 83 % with "{}", 77 % with "a photo of a {}."; on CIFAR-100 55 and 45 %.
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
    """Raises UserError for a name that is neither a prompt nor one of TEMPLATE_SETS."""
    for template in chosen:
        if template not in TEMPLATE_SETS and template.count("{}") != 1:
            raise UserError(
                f"caption.templates: {template!r} must contain {{}} exactly once, or be one of "
                f"open_clip's sets: {', '.join(TEMPLATE_SETS)}"
            )
