from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from divisi.model.text import Tokenizer
from divisi.model.text.tags import CALL, THINK, THINK_END, Segment, Tag, TagMarks, last_tag, tag_ids

texts = st.sampled_from(["a", "bc", "<", "think>", "<think>", "é\n"])
segment_lists = st.lists(texts | st.builds(Tag, st.just(THINK), st.sampled_from([THINK, ""])), max_size=10)


def joined(segments: list[Segment]) -> list[Segment]:
    """Texts side by side as one."""
    found: list[Segment] = []
    for segment in segments:
        if isinstance(segment, str) and found and isinstance(found[-1], str):
            found[-1] += segment
        elif segment:
            found.append(segment)
    return found


@given(segment_lists, st.data())
def test_tags_come_back_however_late_their_text_comes(said: list[Segment], data: st.DataObject) -> None:
    """As behind a stop matcher, which holds text back and lets out parts of it."""
    marks = TagMarks()
    text, out = "", 0
    got: list[Segment] = []
    for segment in said:
        marks.see(segment)
        text += segment.text if isinstance(segment, Tag) else segment
        until = data.draw(st.integers(out, len(text)))
        got += marks.cut(text[out:until])
        out = until
    got += marks.cut(text[out:])
    assert marks.rest() == ""
    assert joined(got) == joined(said)


def test_letters_of_a_tag_that_is_cut_are_text() -> None:
    marks = TagMarks()
    for segment in ("a", Tag(THINK, THINK)):
        marks.see(segment)
    assert marks.cut("a<thi") == ["a"]
    assert marks.rest() == "<thi"


def test_the_tag_that_a_prompt_ends_with(tokenizer: Tokenizer) -> None:
    ids = tag_ids(tokenizer)
    tags = {token_id: name for name, token_id in ids.items()}
    blank = tokenizer.encode("\n\n")
    spelled = [token for letter in THINK for token in tokenizer.encode(letter)]
    assert tokenizer.decode(spelled) == THINK
    for prompt, found in (
        ([ids[THINK], *blank], THINK),
        ([ids[THINK], ids[THINK_END]], THINK_END),
        ([ids[CALL], *tokenizer.encode("x")], None),
        (spelled, None),
        ([], None),
    ):
        assert last_tag(prompt, tokenizer, tags) == found


def test_a_tag_without_text_stands_where_it_came() -> None:
    marks = TagMarks()
    for segment in ("ab", Tag(THINK, ""), "c", Tag(THINK, "")):
        marks.see(segment)
    assert marks.cut("abc") == ["ab", Tag(THINK, ""), "c", Tag(THINK, "")]
