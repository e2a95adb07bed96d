"""A log line goes to one stream, names its rank, and never shows a secret."""

import errno
import io
import logging
import re
import sys

import pytest

from lingua.errors import UserError
from lingua.logger import end_in_log_file, init_logger, redact, show_status

LINE = r"0: %-7s \d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} - \d+:\d\d:\d\d - %s"


@pytest.fixture(autouse=True)
def clean_root(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers, root.level = handlers, level


def as_rank(monkeypatch, rank: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "8")


def test_each_line_is_on_one_stream(capsys):
    logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))  # as after basicConfig
    init_logger()
    init_logger()
    logging.getLogger().info("fine")
    logging.getLogger("lingua.data").warning("careful")
    out, err = capsys.readouterr()
    assert re.fullmatch(LINE % ("INFO", "fine") + "\n", out)
    assert re.fullmatch(LINE % ("WARNING", "careful") + "\n", err)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_line_of_the_log_replaces_the_status(monkeypatch, is_terminal):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: is_terminal)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, screen)
    init_logger()
    show_status("step 3/9")
    logging.getLogger().info("fine")
    show_status("step 4/9")
    logging.getLogger().warning("careful")
    fine, careful = LINE % ("INFO", "fine"), LINE % ("WARNING", "careful")
    clear = re.escape("\r\x1b[K")
    want = f"{clear}step 3/9{clear}{fine}\n{clear}step 4/9{clear}{careful}\n"
    assert re.fullmatch(want if is_terminal else f"{fine}\n{careful}\n", screen.getvalue())


def test_a_status_is_not_shown_by_other_ranks_or_on_a_closed_terminal(monkeypatch):
    class Closed(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, text)

    monkeypatch.setattr(sys, "stdout", Closed())
    show_status("step 3/9")
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    as_rank(monkeypatch, "1")
    show_status("step 3/9")
    assert screen.getvalue() == ""


def test_named_logger_does_not_repeat_on_the_root(capsys):
    init_logger()
    init_logger(name="lingua.only")
    logging.getLogger("lingua.only").info("once")
    assert capsys.readouterr().out.count("once") == 1


def test_further_lines_are_indented(capsys):
    init_logger()
    logging.getLogger().info("first\nsecond")
    assert capsys.readouterr().out.endswith(" - first\n    second\n")


def test_tracebacks_are_kept(capsys):
    init_logger()
    try:
        raise RuntimeError("why")
    except RuntimeError:
        logging.getLogger().exception("it broke")
    assert "RuntimeError: why" in capsys.readouterr().err


def test_only_rank_0_writes_the_file_and_appends(tmp_path, monkeypatch):
    log = tmp_path / "new" / "train.log"
    for rank in "0", "1", "0":
        as_rank(monkeypatch, rank)
        init_logger(log)
        logging.getLogger().info("from %s", rank)
    lines = log.read_text().splitlines()
    assert [line[-6:] for line in lines] == ["from 0", "from 0"]


@pytest.mark.parametrize(
    "error, has_traceback",
    [(UserError("steps=0: no"), False), (KeyboardInterrupt(), False), (ValueError("why"), True)],
)
def test_the_error_that_ends_a_run_is_in_its_log(tmp_path, capsys, error, has_traceback):
    log = tmp_path / "train.log"
    init_logger(log)
    with pytest.raises(type(error)), end_in_log_file():
        raise error
    text = log.read_text()
    assert f"the run ends: {error or 'KeyboardInterrupt'}" in text and "ERROR" in text
    assert ("Traceback" in text) == has_traceback
    assert capsys.readouterr().err == ""  # run_cli prints it


def test_the_prefix_has_the_rank_except_under_slurm(capsys, monkeypatch):
    as_rank(monkeypatch, "3")
    init_logger()
    logging.getLogger().info("x")
    monkeypatch.delenv("LOCAL_RANK")
    for name, value in {"JOB_ID": "1", "PROCID": "3", "LOCALID": "3", "NTASKS": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    init_logger()
    logging.getLogger().info("x")
    torchrun, slurm = capsys.readouterr().out.splitlines()
    assert torchrun.startswith("3: INFO") and slurm.startswith("INFO")


def test_libraries_print_no_debug_lines(capsys):
    init_logger(level="debug")
    logging.getLogger("lingua.data").debug("ours")
    logging.getLogger("matplotlib.font").debug("theirs")
    logging.getLogger("matplotlib.font").info("theirs, worth it")
    out = capsys.readouterr().out
    assert "ours" in out and "worth it" in out and out.count("theirs") == 1


def test_secrets_are_hidden(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("DB_PASSWORD", "swordfish-1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled-anyway")
    init_logger(tmp_path / "log")
    logging.getLogger().info("0123456789abcdef and %s, disabled-anyway", "swordfish-1")
    logging.getLogger().warning("hf_%s", "A1b2" * 8)
    out, err = capsys.readouterr()
    for text in (out + err, (tmp_path / "log").read_text()):
        assert "0123456789abcdef" not in text and "swordfish" not in text and "A1b2" not in text
        assert "<WANDB_API_KEY hidden>" in text and "disabled-anyway" in text
    assert redact("max_tokens=123456789 seed 42") == "max_tokens=123456789 seed 42"


def test_a_log_file_on_a_full_disk_is_one_warning(tmp_path, capfd):
    (tmp_path / "train.log").symlink_to("/dev/full")
    init_logger(tmp_path / "train.log")
    for _ in range(3):
        logging.getLogger().info("a line")
    out, err = capfd.readouterr()
    assert out.count("a line") == 3
    assert err.count("cannot be written (No space left on device)") == 1 and "Traceback" not in err


def test_a_broken_stdout_is_one_warning(monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        init_logger()
        for _ in range(3):
            logging.getLogger().info("a line")
        monkeypatch.undo()
        err = capfd.readouterr().err
        with pytest.raises(OSError):
            full.close()
    assert err.count("stdout or stderr cannot be written (No space left") == 1
    assert "Traceback" not in err
