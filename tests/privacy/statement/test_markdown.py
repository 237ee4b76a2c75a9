"""What somebody else called a label, a node or a data set is shown in a page, and never obeyed."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fedtune.privacy.publication import one_line
from fedtune.privacy.statement.markdown import bullets, coded, plain, table

_PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
_NAMES = st.text(
    st.sampled_from("ab _*`|<>[]()#!&;~\\-=:\n\r\t\x7f\u2028\ud800é") | st.characters(), max_size=20
)


@given(_NAMES)
@example("<script>alert(1)</script>")
@example("a\n\n# b\n---\nlicense: mit")
@example("[a](https://example.org) ![](x) &lt; __b__ `c` ~~d~~")
@example("a\\|b | c")
@example("`")
def test_a_name_is_shown_as_it_is_and_nothing_of_it_is_obeyed(name: str) -> None:
    words = "x " + plain(name) + " y"
    page = "\n\n".join(
        [f"# {words}", bullets([words, f"x {coded(name)} y"]), table(["a", "b"], [[words, "1"]]), words]
    )
    tokens = _PARSER.parse(page)
    inline = [token for token in tokens if token.type == "inline"]
    shown = " ".join(f"x {one_line(name)} y".split())
    for token in (*inline[:2], inline[5], inline[7]):
        assert [child.type for child in token.children or []] == ["text"], page
        assert " ".join(token.children[0].content.split()) == shown  # type: ignore[index]
    assert [child.type for child in inline[2].children or []] == ["text", "code_inline", "text"]
    assert [inline[place].content for place in (3, 4, 6)] == ["a", "b", "1"]
    kinds = [token.type for token in tokens if token.nesting >= 0 and token.type != "inline"]
    item = ["list_item_open", "paragraph_open"]
    row = ["tr_open", "th_open", "th_open", "tbody_open", "tr_open", "td_open", "td_open"]
    assert kinds == [
        "heading_open", "bullet_list_open", *item, *item, "table_open", "thead_open", *row, "paragraph_open"
    ]  # fmt: skip


def test_ordinary_names_are_as_they_were() -> None:
    for name in ("positive", "site-0", "very_good", "clinic 3 (north)", "embedded:minilm", "a.b/c-d", "état"):
        assert plain(name) == name and coded(name) == f"`{name}`"
