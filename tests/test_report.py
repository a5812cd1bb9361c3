"""Reports of machines: what the schema says, what pages show, several side by side, and clear words for damaged ones."""

import copy
import json

import pytest

from course_utils import deployment, files, report
from course_utils.tools import compare
from course_utils.tools import report as tools_report


@pytest.fixture(scope="module")
def content():
    from course_utils import backends

    ways = tuple(w for w in deployment.WAYS if w.how == deployment.AS_IT_IS or w.engine == backends.default_engine())
    absent = deployment.Way("INT8, absent", "tensorrt", "int8", deployment.STATIC, "TensorRT")
    said = []
    found = report.measure_machine(
        size=32, rounds=3, test_images=40, repeats=2, ways=(*ways, absent), progress=said.append
    )
    assert said[0].startswith("A/A test") and "on torch" in said
    return found


def test_a_measured_report_is_what_the_schema_says(content):
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(report.SCHEMA)
    report.check(content)
    assert json.loads(json.dumps(content)) == content, "nothing in it that JSON changes"
    assert [rung["precision"] for rung in content["ladder"]] == ["fp32", "int8"] and "INT8, absent" in content[
        "missing"
    ]
    assert content["conditions"]["test_images"] == 40 and len(content["layers"]) == 21


def test_every_field_of_the_schema_is_described():
    def visit(schema, where):
        if schema.get("type") == "object":
            for name, inner in schema.get("properties", {}).items():
                assert inner.get("description") or inner.get("enum"), f"{where}/{name} is not described"
                visit(inner, f"{where}/{name}")
        if schema.get("type") == "array":
            assert schema["items"]["description"], f"items of {where} are not described"
            visit(schema["items"], f"{where}[]")

    visit(report.SCHEMA, "")


def test_pages_hold_every_rung_and_their_own_pictures(content, tmp_path):
    paths = report.write(content, tmp_path / "here")
    assert report.read(paths[0]) == content
    text, page = (path.read_text(encoding="utf-8") for path in paths[1:])
    for rung in content["ladder"]:
        assert f"| {rung['name']} |" in text and rung["name"] in page
    assert "INT8, absent" in text and content["machine"]["cpu"] in page
    assert "(ladder.png)" in text and (tmp_path / "here/roofline.png").exists()
    assert page.count('src="data:image/png;base64,') == 2 and "<table>" in page and ".png" not in page


def test_text_of_a_report_cannot_become_part_of_the_page(content):
    strange = copy.deepcopy(content)
    strange["machine"]["cpu"] = "<script>alert(1)</script>"
    page = report.html(report.markdown(strange, {"ladder": "a.png", "roofline": "b.png"}))
    assert "<script>" not in page


def test_a_report_is_shown_with_its_own_numbers():
    assert report.times({"value": 3.389, "low": 3.27, "high": 3.5}) == "3.39× [3.27, 3.50]"
    assert report.times({"value": 1, "low": 0.9, "high": 1.1}) == "1.00× [0.90, 1.10]"
    for text in ("# One & two\n\n*some*", "# Three\n\n| a | b |\n|---|---|\n| 1 | 2 |"):
        title, page = text.partition("\n")[0][2:].replace("&", "&amp;"), report.html(text)
        assert f"<title>{title}" in page and ("<em>some</em>" in page) != ("<td>1</td>" in page)
    for stored in report.stored().values():
        slowest = min(stored["ladder"], key=lambda rung: rung["over_eager"]["value"])
        table, figures = report.table(stored), report.figures(stored)
        assert table.rows[0][:2] == [slowest["name"], f"{slowest['ms']['median']:.2f}"]
        assert len(table.rows) == len(stored["ladder"])
        axis = figures["ladder"].axes[0]
        assert stored["machine"]["cpu"] in axis.get_title()
        shown = {label.get_text() for label in axis.get_yticklabels()}
        assert shown == {rung["name"] for rung in stored["ladder"]}
        assert axis.dataLim.x1 == max(rung["over_eager"]["high"] for rung in stored["ladder"])


def test_several_machines_stand_side_by_side_and_what_one_lacks_is_a_dash(content):
    other = copy.deepcopy(content)
    del other["ladder"][1]
    other["machine"]["cpu"] = "another processor"
    text = report.compare({"mine": content, "theirs": other})
    assert "| mine | theirs |" in text and "another processor" in text
    rows = [line for line in text.splitlines() if line.startswith(f"| {content['ladder'][1]['name']}")]
    assert len(rows) == 4 and all(row.endswith("| – |") for row in rows)
    assert "different networks or sizes" not in text
    other["conditions"]["size"] = 224
    assert "different networks or sizes" in report.compare({"mine": content, "theirs": other})


def test_one_report_is_not_enough(content):
    with pytest.raises(report.ReportError, match="at least two"):
        report.compare({"mine": content})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="squeeze-report-99"), "squeeze-report-99.*reads 'squeeze-report-1'.*make report"),
        (lambda c: c["ladder"][0].pop("ms"), r"damaged at ladder/0 .*'ms' is a required property"),
        (lambda c: c["aa_test"].update(repeats="many"), "damaged at aa_test/repeats"),
    ],
)
def test_a_damaged_report_is_refused(content, tmp_path, change, message):
    damaged = copy.deepcopy(content)
    change(damaged)
    with pytest.raises(report.ReportError, match=message):
        report.write(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "x.json").write_text(json.dumps(damaged))
    with pytest.raises(report.ReportError, match="x.json"):
        report.read(tmp_path / "x.json")


def test_the_command_measures_and_names_the_files_it_wrote(tmp_path, monkeypatch, capsys):
    def measure_machine(*, progress, **settings):
        progress("A/A test")
        return settings

    monkeypatch.setattr(report, "measure_machine", measure_machine)
    monkeypatch.setattr(report, "write", lambda content, folder: [folder / name for name in ("a.json", *content)])
    monkeypatch.setattr(files, "results_dir", lambda: tmp_path)
    folder = tmp_path / "report"
    for arguments, settings in (([], ()), (["--fast"], tools_report.FAST)):
        tools_report.main(arguments)
        assert capsys.readouterr().out.splitlines() == ["A/A test", *(str(folder / n) for n in ("a.json", *settings))]


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(report.ReportError, match=r"cannot read .*none\.json.*make report"):
        report.read(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": ')
    with pytest.raises(report.ReportError, match=r"half\.json is not JSON"):
        report.read(tmp_path / "half.json")


def test_make_compare_lays_yours_beside_those_you_collected_and_those_of_the_course(
    content, tmp_path, capsys, monkeypatch
):
    def columns(*arguments):
        assert compare.main([str(argument) for argument in arguments]) == 0
        assert "<table>" in (tmp_path / "results/compare.html").read_text(encoding="utf-8")
        lines = (tmp_path / "results/compare.md").read_text(encoding="utf-8").splitlines()
        return [cell.strip() for cell in next(line for line in lines if line.startswith("|")).strip("| ").split("|")]

    of_the_course = sorted(path.stem for path in (report.files.data_dir() / "reports").glob("*.json"))
    assert report.REFERENCE in of_the_course and columns() == of_the_course
    report.write(content, tmp_path / "results/report")  # as `make report` does, for results/ is that of this test
    assert columns() == ["this machine", *of_the_course]
    collected = tmp_path / "results/reports"
    collected.mkdir()
    (tmp_path / "results/report/report.json").rename(collected / "theirs.json")
    assert columns() == ["theirs", *of_the_course]
    for name in ("a", "b"):
        report.write(content, tmp_path / name)
    assert columns(*(tmp_path / name / "report.json" for name in ("a", "b"))) == ["a", "b"], "named by their folders"
    assert compare.main([str(collected / "theirs.json")] * 2) == 2
    assert "the same name" in capsys.readouterr().err
    (collected / "theirs.json").unlink()
    (tmp_path / report.files.MANIFEST).write_text("{}")
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    assert (
        compare.main([]) == 2 and "at least two reports" in (said := capsys.readouterr().err) and "make report" in said
    )


@pytest.mark.parametrize("name", ["avx512-vnni", "avx2"])
def test_a_report_gives_what_the_roofline_was_made_of(name):
    stored = report.stored()[name]
    ceilings, work, milliseconds = report.as_roofline(stored)
    assert ceilings.peaks == stored["ceilings"]["operations"] and ceilings.bandwidth == stored["ceilings"]["bandwidth"]
    layer = stored["layers"][0]
    for precision, size in layer["bytes"].items():
        first = work[precision][0]
        assert (first.name, first.operations, first.bytes) == (layer["name"], layer["operations"], size)
        assert milliseconds[precision][layer["name"]] == layer["ms"][precision]
        assert len(work[precision]) == len(stored["layers"])
    assert str(ceilings).count("its report") == len(ceilings.peaks) + 1
