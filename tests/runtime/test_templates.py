"""Values in templates: escaped in HTML, visible, and never undefined."""

import jinja2
import pytest
from markupsafe import Markup

from pipeline.runtime import templates


def test_html_is_escaped_and_invisible_characters_are_shown():
    page = templates.environment().from_string("{{ text }} {{ count|number }}")
    text = "<b>\u202eblue\x1b\ud800\u3000é\n"
    expected = "&lt;b&gt;⟨U+202E⟩blue⟨U+001B⟩⟨U+D800⟩\u3000é\n 1,234"
    assert page.render(text=text, count=1234) == expected


def test_lists_and_dicts_are_made_visible_but_markup_is_kept():
    assert templates.visible({"a": ["\x00", 1]}) == {"a": ["⟨U+0000⟩", 1]}
    assert templates.visible(Markup("\x1b")) == "\x1b"


def test_other_text_is_not_escaped():
    plain = templates.environment(lambda value: value.upper(), autoescape=False)
    assert plain.from_string("{{ text }}\n").render(text="<b>") == "<B>\n"


def test_an_undefined_name_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        templates.environment().from_string("{{ nothing }}").render()
