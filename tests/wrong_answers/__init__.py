"""Wrong answers as learners write them, one file for each file of `course_utils.exercises`.

WRONG: id of an exercise → name of its `Mistake` → an answer that makes it, written without looking at the mistake's own code.
ELSE: id → part of the verdict's text → an answer that is wrong in another way, one that no `Mistake` names.
"""
