"""What people run from the Makefile: each file is one command, `python -m course_utils.tools.<name>`."""
