from course_utils.tables import Table

TABLE = Table(["", "size", "accuracy"], [["FP32", "44.8", "94 %"], ["INT8 static", "11.3", "93.9 %"]])


def test_columns_line_up_with_the_first_to_the_left():
    assert str(TABLE).splitlines() == [
        "             size  accuracy",
        "FP32         44.8      94 %",
        "INT8 static  11.3    93.9 %",
    ]
    assert repr(TABLE) == str(TABLE)


def test_markdown_is_what_github_and_notebooks_render():
    assert TABLE.markdown().splitlines() == [
        "|  | size | accuracy |",
        "| --- | ---: | ---: |",
        "| FP32 | 44.8 | 94 % |",
        "| INT8 static | 11.3 | 93.9 % |",
    ]
    assert TABLE._repr_markdown_() == TABLE.markdown()
    assert Table(["a"], [["x"]]).markdown() == "| a |\n| --- |\n| x |"


def test_cells_may_be_numbers():
    assert str(Table(["a", "b"], [["x", 12]])) == "a   b\nx  12"


def test_a_table_without_rows_has_its_titles():
    assert str(Table(["a", "b"], [])) == "a  b"
