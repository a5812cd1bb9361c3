"""What is printed past Python: kept away, handed over, and the stream put back."""

import io
import logging
import os
import sys
import warnings

import pytest

from course_utils.backends import program
from course_utils.output import captured


@pytest.mark.parametrize("descriptor", [1, 2])
def test_what_is_printed_past_python_is_kept_and_the_stream_is_put_back(descriptor, capfd):
    with captured(descriptor) as text:
        os.write(descriptor, b"inside\n")
    os.write(descriptor, b"outside\n")
    assert text == ["inside\n"]
    assert capfd.readouterr()[descriptor - 1] == "outside\n"


def test_an_error_passes_and_the_text_is_there(capfd):
    with pytest.raises(KeyError), captured(2) as text:
        os.write(2, b"why")
        raise KeyError
    assert text == ["why"] and capfd.readouterr().err == ""


def test_engines_are_mute_in_a_notebook_too_where_stderr_is_no_file(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    for time in ("once", "twice"):
        with pytest.raises(KeyError) as error, program.mute():
            os.write(2, b"by C, ")
            sys.stderr.write(f"by C++, {time}")
            raise KeyError
        assert shown.getvalue() == capfd.readouterr().err == ""
        assert error.value.__notes__ == [f"by C, by C++, {time}"]


@pytest.mark.parametrize("keep", [program.quietly, program.making])
def test_warnings_and_chatter_are_kept_away_and_levels_put_back(keep, caplog):
    logger = logging.getLogger("course.chatter")
    for level in (logging.DEBUG, logging.INFO):
        logger.setLevel(level)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(KeyError), keep("course.chatter"):
                warnings.warn("nothing to be done about it", stacklevel=1)
                logger.warning("nor about this")
                logger.error("this is another matter")
                raise KeyError
        assert logger.level == level
    assert [record.message for record in caplog.records] == ["this is another matter"] * 2
