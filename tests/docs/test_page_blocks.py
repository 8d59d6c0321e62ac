"""Every block of the README and of the documentation runs, and does what the page shows."""

import pytest
from made_files import MadeFiles, Outcome, snapshot
from markdown_pages import Page, all_pages
from page_run import PageRun


@pytest.mark.parametrize("name", all_pages())
def test_page_runs_in_its_order(
    name, tmp_path, monkeypatch, capfd, made, warm_python, family_checkpoint
):
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def read_output():
        captured = capfd.readouterr()
        return captured.out + captured.err

    run = PageRun(
        Page(name),
        folder=folder,
        checkpoint=family_checkpoint("mixtral"),
        made=made,
        warm_python=warm_python,
        read_output=read_output,
    )
    wrong = []
    try:
        for block in Page(name).blocks:
            try:
                run.run(block)
            except Exception as error:
                error.add_note(f"in the block at {name}:{block.line}")
                wrong.append(error)
    finally:
        run.end()
    if wrong:
        raise ExceptionGroup(f"{len(wrong)} blocks of {name}", wrong)


def test_there_is_something_to_run():
    blocks = {name: Page(name).blocks for name in all_pages()}
    assert sum(len(b.commands) for b in blocks["README.md"]) >= 10
    assert any(block.language == "python" for block in blocks["README.md"])


def test_what_a_command_made_is_given_to_the_next_page_that_begins_alike(tmp_path):
    made = MadeFiles(tmp_path / "made")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    before = snapshot(first)
    (first / "outputs/run").mkdir(parents=True)
    (first / "outputs/run/a.txt").write_text("made")
    made.keep("write", first, before, Outcome(0, "said"))
    assert made.again("write", second) == Outcome(0, "said")
    assert (second / "outputs/run/a.txt").read_text() == "made"
    assert made.again("write", second) is None, "it would meet what is there"
    # Another command goes on in the same folder: it depends on what is there.
    before = snapshot(first)
    (first / "outputs/run/b.txt").write_text("more")
    made.keep("write more", first, before, Outcome(0, ""))
    assert made.again("write more", tmp_path / "made") is None
