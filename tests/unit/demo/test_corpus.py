"""What the training reads out of pages and modules."""

from __future__ import annotations

from pathlib import Path

from vllm_pd.demo.conversation import phrasings
from vllm_pd.demo.corpus import (
    MAX_ANSWER_LEN,
    Corpus,
    Topic,
    first_sentences,
    parse_markdown,
    parse_python,
    read_corpus,
)

PAGE = """\
# Title

First line
second line with a [link](https://example.org) and **weight**. More.

## 2. Start the service
Run this:

```sh
# not a heading
bash start.sh
```

Then wait.

| key | meaning | default |
|-----|:-------:|---------|
| `lease_s` | How long blocks wait. | `30` \\| more |
| `bare` | | |

- one
  goes on
- two
<!-- hidden -->
"""

MODULE = '''\
"""A module.

With ``code`` in
two lines.
"""

class Options:
    """Some options.

    Attributes:
        port: the port
            to listen on.
        host: the host.
    """

    def check(self):
        """Check them."""

@app.command("_supervise", hidden=True)
def supervise():
    """Not for users."""

@app.command()
def demo_model(folder):
    """Write the demo model.

    Args:
        folder: where.
    """

@app.command("up")
async def start():
    """Start everything."""

def bare():
    pass
'''


def answer(corpus: Corpus, name: str) -> str:
    (found,) = [topic.answer for topic in corpus.topics if topic.name == name]
    return found


def test_paragraphs_are_joined_and_markup_is_removed() -> None:
    assert (
        "First line second line with a link and weight. More." in parse_markdown(PAGE).documents[0]
    )


def test_list_items_stay_on_their_lines() -> None:
    assert "- one goes on\n- two" in parse_markdown(PAGE).documents[0]


def test_comments_are_dropped() -> None:
    assert "hidden" not in parse_markdown(PAGE).documents[0]


def test_headings_become_topics_without_their_number() -> None:
    assert [topic.name for topic in parse_markdown(PAGE).topics][:2] == [
        "Title",
        "Start the service",
    ]


def test_an_answer_includes_the_command_that_follows() -> None:
    assert answer(parse_markdown(PAGE), "Start the service") == (
        "Run this:\n\n```sh\n# not a heading\nbash start.sh\n```"
    )


def test_rows_of_option_tables_become_topics() -> None:
    assert answer(parse_markdown(PAGE), "lease_s") == (
        "`lease_s`: How long blocks wait; default: `30` | more."
    )


def test_tables_become_lines_without_their_rulers() -> None:
    (text,) = parse_markdown(PAGE).documents
    assert "default: `30` | more\n`bare`\n" in text


def test_an_empty_page_gives_nothing() -> None:
    assert parse_markdown("") == Corpus((), ())


def test_public_docstrings_become_running_text() -> None:
    (text,) = parse_python(MODULE, "pkg.mod").documents
    assert "`pkg.mod`: A module.\n\nWith `code` in two lines." in text
    assert "`pkg.mod.Options`: Some options." in text


def test_methods_and_hidden_commands_are_left_out() -> None:
    (text,) = parse_python(MODULE, "pkg.mod").documents
    assert "Check them" not in text
    assert "Not for users" not in text


def test_attributes_are_topics_only_where_they_are_settings() -> None:
    assert "port" not in {topic.name for topic in parse_python(MODULE, "pkg.mod").topics}


def test_settings_become_topics() -> None:
    assert answer(parse_python(MODULE, "pkg.mod", has_settings=True), "port") == (
        "`port` of `Options`: the port to listen on."
    )


def test_commands_are_known_by_what_a_user_types() -> None:
    names = {topic.name for topic in parse_python(MODULE, "pkg.mod").topics}
    assert {"vllm-pd demo-model", "vllm-pd up"} <= names


def test_arguments_are_left_out_of_answers() -> None:
    assert answer(parse_python(MODULE, "pkg.mod"), "vllm-pd demo-model") == (
        "`vllm-pd demo-model`: Write the demo model."
    )


def test_answers_end_with_a_sentence() -> None:
    text = "A sentence of some length. " * 40
    kept = first_sentences(text)
    assert kept.endswith("length.")
    assert len(kept) <= MAX_ANSWER_LEN


def test_pages_of_a_repository_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "vllm_pd").mkdir()
    (tmp_path / "README.md").write_text("# Read me\n\nFirst.")
    (tmp_path / "docs" / "a.md").write_text("# Page\n\nSecond.")
    (tmp_path / "vllm_pd" / "__init__.py").write_text('"""Third."""\n')
    (tmp_path / "vllm_pd" / "a.py").write_text('"""Fourth."""\n')
    corpus = read_corpus(tmp_path)
    assert corpus.documents == (
        "# Read me\n\nFirst.",
        "# Page\n\nSecond.",
        "`vllm_pd`: Third.\n\n`vllm_pd.a`: Fourth.",
    )
    assert corpus.topics[0] == Topic("Read me", "First.")


def test_tasks_are_asked_for_as_tasks() -> None:
    assert "How do I stop the service?" in phrasings("Stop the service")
    assert "What is lease_s?" in phrasings("lease_s")


def test_a_heading_that_is_a_question_is_asked_as_it_is() -> None:
    assert phrasings("Does it work on NPUs?") == ("Does it work on NPUs?", "Does it work on NPUs")
