"""A report of one machine: what it is, what it can do at most, and the ladder of engines measured on it; and several side by side.

`measure_machine` returns what `SCHEMA` describes, ready for JSON; everything else here is made from that alone.
"""

import base64
import datetime
import functools
import json
from pathlib import Path

import torch

from . import backends, cost, data, deployment, energy, files, measure, models, roofline
from .tables import Table

FORMAT = "squeeze-report-1"
NETWORK = "resnet18"
REFERENCE = "avx512-vnni"  # of the reports that come with the course, that of the machine it was made on
LARGEST = 1e300


def _object(description, properties, optional=()):
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }


def _number(description):
    # Finite: JSON has integers that no float can hold, and Python's reads Infinity.
    return {"type": "number", "minimum": -LARGEST, "maximum": LARGEST, "description": description}


def _text(description):
    return {"type": "string", "description": description}


def _list(description, items):
    return {"type": "array", "items": items, "minItems": 1, "description": description}


def _mapping(description, values):
    return {"type": "object", "additionalProperties": values, "description": description}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c }}
table {{ border-collapse: collapse; font-size: 90%; display: block; overflow-x: auto }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #e2e8f0 }}
img {{ max-width: 100% }}
</style></head><body>
{body}</body></html>
"""
ENDS = {
    "value": _number("of what was measured"),
    "low": _number("lower end"),
    "high": _number("upper end of the interval"),
}
RATIO = _object("times as fast: the median over the rounds of the ratio within a round", ENDS)
# https://json-schema.org/draft/2020-12/schema
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Report of one machine, by Squeeze & Speed Up",
    **_object(
        "Milliseconds, bytes and shares (0 to 1) throughout; intervals are 95 %.",
        {
            "format": {"const": FORMAT, "description": "grows when a field changes its meaning"},
            "date": _text("day of the measurement, ISO 8601"),
            "machine": {
                "type": "object",
                "description": "as measure.machine() has it: cpu, isa, cores, threads, memory_gib, versions",
                "required": ["cpu", "isa", "threads", "python", "torch"],
            },
            "conditions": _object(
                "under which the ladder was timed",
                {
                    "network": _text("name of the network"),
                    "size": _number("pixels of the one image that is timed, on each side"),
                    "rounds": _number("interleaved rounds"),
                    "test_images": _number("images of 64 × 64 that accuracy was measured on"),
                },
            ),
            "aa_test": _object(
                "the same network timed against itself",
                {
                    "repeats": _number("how often"),
                    "contained": _number("how often the interval contained 1"),
                    "confidence": _number("of the intervals"),
                    "resolution": _number("what is closer to 1 could not be told from it: share"),
                },
            ),
            "ceilings": _object(
                "the machine's limits, measured",
                {
                    "operations": _mapping("precision → operations a second", _number("reached")),
                    "bandwidth": _number("bytes a second"),
                },
            ),
            "layers": _list(
                "in the order they run",
                _object(
                    "one layer of the network",
                    {
                        "name": _text("as in the network"),
                        "operations": _number("in one image"),
                        "bytes": _mapping("precision → bytes, each number moved once", _number("moved")),
                        "ms": _mapping(
                            "precision → median milliseconds; FP32 eager, INT8 by torch", _number("over the calls")
                        ),
                    },
                ),
            ),
            "ladder": _list(
                "in the order of deployment.WAYS; eager FP32 first",
                _object(
                    "one way to run the network",
                    {
                        "name": _text("of deployment.WAYS"),
                        "engine": _text("of backends.engines()"),
                        "precision": {"enum": ["fp32", "bf16", "fp16", "int8"]},
                        "family": _text("ways that share a compiler and runtime"),
                        "ms": _object("of one image", {k: _number("over the rounds") for k in ("median", "q1", "q3")}),
                        "over_eager": RATIO,
                        "own_fp32": _text("the fastest FP32 of its family"),
                        "over_own_fp32": RATIO,
                        "of_ceiling": _number("share of what arithmetic and memory allow, by the roofline"),
                        "bytes": _number("of its file"),
                        "accuracy": _object(
                            "on the test images",
                            ENDS,
                        ),
                        "agreement": _number("share of test images with the prediction of eager FP32"),
                        "difference": _object("of the accuracy from eager FP32's", ENDS),
                    },
                    optional=("of_ceiling",),
                ),
            ),
            "missing": _mapping("name of a way that does not run here → why", _text("what to do about it")),
            "energy": _list(
                "of FP32 and of INT8, both of one kind",
                _object(
                    "of one image",
                    {
                        "name": _text("FP32 or INT8"),
                        "kind": {"enum": ["measured", "estimated"]},
                        "joules": _number("of one call; the middle of what is estimated"),
                        "source": _text("counters, or the table it was estimated from"),
                    },
                ),
            ),
        },
    ),
}


class ReportError(RuntimeError):
    """A report cannot be read; the message says which one, what is wrong with it and what to do."""


def measure_machine(
    *, size=224, rounds=30, test_images=None, repeats=20, ways=deployment.WAYS, progress=lambda text: None
):
    """Measure this machine and return its report, a dict as `SCHEMA` has it. Takes some minutes.

    size: of the image that is timed. rounds: of the ladder, and of each repeat of the A/A test. test_images: how many of the
    official ones accuracy is measured on, all by default. ways: of `deployment`. progress: called with a line of text at each part.
    """
    model = models.load(NETWORK)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    progress(f"A/A test, {repeats} repeats")
    with torch.no_grad():
        tie = measure.aa_test(functools.partial(model, image[:, :, :64, :64]), repeats=repeats, rounds=rounds)
    progress("ceilings")
    ceilings = roofline.ceilings()
    calibration = {
        s: data.batches(data.fashion_mnist("calibration", size=s), 32, limit=n) for s, n in ((64, 256), (size, 64))
    }
    judges = data.batches(data.fashion_mnist("test"), 100, limit=test_images)
    ladder = deployment.climb(
        model,
        calibration[size],
        calibration=calibration[64],
        judges=judges,
        ways=ways,
        rounds=rounds,
        on_family=lambda name: progress(f"on {name}"),
    )
    progress("layers and energy")
    int8 = backends.quantize_static(model, calibration[size])
    return {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "machine": measure.machine(),
        "conditions": {
            "network": NETWORK,
            "size": size,
            "rounds": rounds,
            "test_images": judges.n,
        },
        "aa_test": {key: getattr(tie, key) for key in ("repeats", "contained", "confidence", "resolution")},
        "ceilings": {"operations": ceilings.peaks, "bandwidth": ceilings.bandwidth},
        "layers": _layers(model, int8, image),
        "ladder": [_rung(rung, ceilings, model, size) for rung in ladder.values()],
        "missing": ladder.missing,
        "energy": _energies(model, int8, image),
    }


def _layers(model, int8, image):
    works = {name: roofline.layers(model, image.shape[1:], bits) for name, bits in (("FP32", 32), ("INT8", 8))}
    ms = {"FP32": measure.by_layer(model, image), "INT8": measure.by_layer(int8, image)}
    return [
        {
            "name": work.name,
            "operations": work.operations,
            "bytes": {name: found[i].bytes for name, found in works.items()},
            "ms": {name: times[work.name] for name, times in ms.items() if work.name in times},
        }
        for i, work in enumerate(works["FP32"])
    ]


def _rung(rung, ceilings, model, size):
    timing, judged, share = rung.timing, rung.judged, deployment.of_ceiling(rung, ceilings, model, size)
    row = {
        "name": rung.way.name,
        "engine": rung.way.engine,
        "precision": rung.way.precision,
        "family": rung.way.family,
        "ms": {"median": timing.median, "q1": timing.q1, "q3": timing.q3},
        "over_eager": _ratio(timing.speedup, timing.speedup_low, timing.speedup_high),
        "own_fp32": rung.fp32,
        "over_own_fp32": _ratio(*rung.over_fp32),
        "bytes": rung.bytes,
        "accuracy": _ratio(judged.second.value, judged.second.low, judged.second.high),
        "agreement": judged.agreement,
        "difference": _ratio(judged.difference, judged.low, judged.high),
    }
    return row if share is None else row | {"of_ceiling": share}


def _ratio(value, low, high):
    return {"value": value, "low": low, "high": high}


def _energies(model, int8, image):
    costs, found = cost.cost(model, image.shape[1:]), []
    for name, network in (("FP32", model), ("INT8", int8)):
        with torch.no_grad():
            guess = energy.estimate(costs, arithmetic=name.lower())
            used = measure.energy(functools.partial(network, image), estimate=guess)
        found.append({"name": name, "kind": used.kind, "joules": used.joules, "source": used.source})
    return found


def check(content, name="the report"):
    """Raise `ReportError` unless `content` is what `SCHEMA` describes."""
    import jsonschema

    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ReportError(
            f"{name} has format {found!r}, this course reads {FORMAT!r}: make it again with `make report`"
        )
    if error := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMA).iter_errors(content)):
        where = "/".join(map(str, error.absolute_path)) or "its top"
        raise ReportError(f"{name} is damaged at {where} ({error.message:.200}): make it again with `make report`")


def read(path):
    """Return the report in the JSON file `path`. Raises `ReportError` when it is missing, damaged, or of another format."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        # Halves of characters, which JSON can name and no page can hold, are a ValueError.
        json.dumps(content, ensure_ascii=False).encode()
    except OSError as error:
        raise ReportError(f"cannot read {path} ({error.strerror}): make a report with `make report`") from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON ({error}): make it again with `make report`") from None
    check(content, str(path))
    return content


def stored():
    """Return the reports that come with the course, a dict of name → report: `REFERENCE` first. Errors as in `read`."""
    paths = sorted((files.data_dir() / "reports").glob("*.json"), key=lambda path: (path.stem != REFERENCE, path.stem))
    return {path.stem: read(path) for path in paths}


def as_roofline(report):
    """Return `(ceilings, work, milliseconds)` of a report, as `roofline.ceilings`, `roofline.layers` and `measure.by_layer` make
    them: what `widgets.Roofline` takes."""
    ceilings, layers = report["ceilings"], report["layers"]
    precisions = [name for name in layers[0]["bytes"] if all(name in layer["bytes"] for layer in layers)]
    how = dict.fromkeys([*ceilings["operations"], "bandwidth"], "its report")
    return (
        roofline.Ceilings(ceilings["operations"], ceilings["bandwidth"], report["machine"]["threads"], how),
        {
            p: [roofline.Work(layer["name"], layer["operations"], layer["bytes"][p]) for layer in layers]
            for p in precisions
        },
        {p: {layer["name"]: layer["ms"][p] for layer in layers if p in layer["ms"]} for p in precisions},
    )


def figures(report):
    """Return the report's pictures: a dict of name → figure."""
    from . import plots

    ladder = sorted(report["ladder"], key=lambda rung: rung["over_eager"]["value"])
    ceilings, work, milliseconds = as_roofline(report)
    points = {name: roofline.achieved(work[name], milliseconds[name]) for name in work}
    return {
        "ladder": plots.intervals(
            [(rung["name"], *rung["over_eager"].values()) for rung in ladder],
            xlabel="times as fast as FP32, eager (line: 95 % interval)",
            title=f"{report['conditions']['network']} on {report['machine']['cpu']}",
            baseline=1,
        ),
        "roofline": plots.roofline(
            ceilings.peaks, ceilings.bandwidth, points, title="Each layer below the machine's limits"
        ),
    }


def markdown(report, pictures):
    """Return the report as Markdown. pictures: name of a figure → its address."""
    machine, conditions, tie = report["machine"], report["conditions"], report["aa_test"]
    limits = [[name, f"{rate / 1e9:,.0f} G operations/s"] for name, rate in report["ceilings"]["operations"].items()]
    limits.append(["memory", f"{report['ceilings']['bandwidth'] / 1e9:.1f} GB/s"])
    energies = [[e["name"], f"{1000 * e['joules']:.3g} mJ", e["kind"], e["source"]] for e in report["energy"]]
    parts = [
        f"# {conditions['network']} on {machine['cpu']}",
        f"Measured on {report['date']}. One image of {conditions['size']} × {conditions['size']} pixels, "
        f"{conditions['rounds']} interleaved rounds; accuracy on {conditions['test_images']:,} test images of Fashion-MNIST at "
        "64 × 64. Brackets are 95 % intervals.",
        "## The machine",
        Table(["", ""], [[key, _plain(value)] for key, value in machine.items()]).markdown(),
        "## Can its clock be trusted?",
        f"The same network timed against itself: the {100 * tie['confidence']:g} % interval of the ratio contained 1 in "
        f"{tie['contained']} of {tie['repeats']} repeats. A ratio that is off by less than {tie['resolution']:.1%} could not be "
        "told from 1.",
        "## The ladder",
        table(report).markdown(),
        f"![ladder]({pictures['ladder']})",
        *([f"Not run here:\n\n{_bullets(report['missing'])}"] if report["missing"] else []),
        "## The limit",
        Table(["", "reached"], limits).markdown(),
        f"![roofline]({pictures['roofline']})",
        "## Energy of one image",
        Table(["", "energy", "how", "source"], energies).markdown(),
        "Estimated energies leave out " + energy.LEFT_OUT + "." if report["energy"][0]["kind"] == "estimated" else "",
        "---\n\nMade by `make report` of Squeeze & Speed Up. Its `report.json` can be laid beside others with `make compare`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(report):
    """Return a report's ladder as a `Table`, the slowest rung first."""
    first, rungs = report["ladder"][0]["name"], sorted(report["ladder"], key=lambda rung: rung["over_eager"]["value"])
    columns = [
        "",
        "median ms",
        f"over {first}",
        "over its own FP32",
        "of the limit",
        "accuracy",
        "same prediction",
        "file",
    ]
    return Table(columns, [_ladder_row(rung) for rung in rungs])


def _ladder_row(rung):
    return [
        rung["name"],
        f"{rung['ms']['median']:.2f}",
        times(rung["over_eager"]),
        "–" if rung["name"] == rung["own_fp32"] else times(rung["over_own_fp32"]),
        f"{rung['of_ceiling']:.0%}" if "of_ceiling" in rung else "–",
        f"{rung['accuracy']['value']:.2%}",
        f"{rung['agreement']:.2%}",
        f"{rung['bytes'] / 1e6:.1f} MB",
    ]


def times(ratio):
    """Return a ratio of a report, a dict of value, low and high, as text: `3.39× [3.27, 3.50]`."""
    return "{value:.2f}× [{low:.2f}, {high:.2f}]".format(**ratio)


def _plain(value):
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bullets(reasons):
    return "\n".join(f"- {name}: {why}" for name, why in reasons.items())


def html(text):
    """Return Markdown as one HTML page."""
    import mistune

    title = text.partition("\n")[0].strip("# ")
    return PAGE.format(title=mistune.escape(title), body=mistune.create_markdown(plugins=["table"])(text))


def write(report, folder):
    """Write a report to `folder`: report.json, report.md with its pictures, and report.html, which holds them. Return the paths.

    Raises `ReportError` for one that `SCHEMA` does not allow, before anything is written.
    """
    import matplotlib.pyplot as plt

    check(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    inside, paths = {}, [folder / f"report.{kind}" for kind in ("json", "md", "html")]
    for name, figure in figures(report).items():
        with files.replacing(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=110, bbox_inches="tight")
            inside[name] = "data:image/png;base64," + base64.b64encode(partial.read_bytes()).decode()
        plt.close(figure)
    files.write_text(paths[0], json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    files.write_text(paths[1], markdown(report, {name: f"{name}.png" for name in inside}))
    files.write_text(paths[2], html(markdown(report, inside)))
    return paths


def compare(reports):
    """Return several reports side by side, as Markdown. reports: dict of label → report; at least two.

    Times of different machines are not compared with each other in intervals, for they were not interleaved: what can be
    compared are the ratios that each machine measured in its own run.
    """
    if len(reports) < 2:
        raise ReportError(f"need at least two reports to compare, got {len(reports)}")
    facts = ("cpu", "isa", "cores", "threads", "memory_gib", "system", "torch")
    names = list(dict.fromkeys(rung["name"] for report in reports.values() for rung in report["ladder"]))
    rungs = {label: {rung["name"]: rung for rung in report["ladder"]} for label, report in reports.items()}

    def column(title, cell):
        rows = [[n, *(cell(rungs[label][n]) if n in rungs[label] else "–" for label in reports)] for n in names]
        return f"## {title}\n\n" + Table(["", *reports], rows).markdown()

    machines = [[fact, *(_plain(report["machine"].get(fact, "–")) for report in reports.values())] for fact in facts]
    machines.append(["measured on", *(report["date"] for report in reports.values())])
    for precision in dict.fromkeys(p for report in reports.values() for p in report["ceilings"]["operations"]):
        peaks = [report["ceilings"]["operations"].get(precision) for report in reports.values()]
        machines.append(
            [f"{precision} limit, G operations/s", *("–" if p is None else f"{p / 1e9:,.0f}" for p in peaks)]
        )
    sizes = {(r["conditions"]["network"], r["conditions"]["size"]) for r in reports.values()}
    warning = [] if len(sizes) == 1 else [f"These reports are of different networks or sizes: {sorted(sizes)}."]
    parts = [
        f"# {len(reports)} machines side by side",
        *warning,
        Table(["", *reports], machines).markdown(),
        column("Times as fast as eager FP32 on the same machine", lambda rung: times(rung["over_eager"])),
        column("Times as fast as the fastest FP32 of the same engine", lambda rung: times(rung["over_own_fp32"])),
        column("Milliseconds an image", lambda rung: f"{rung['ms']['median']:.2f}"),
        column("Accuracy", lambda rung: f"{rung['accuracy']['value']:.2%}"),
    ]
    return "\n\n".join(parts) + "\n"
