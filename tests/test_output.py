"""What is printed past Python: kept away, handed over, and the stream put back."""

import os

import pytest

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
