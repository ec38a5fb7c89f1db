"""Long runs and deep models: read as a stream, drawn as far as pixels show, and thinned; no spike is lost."""

import gc
import json
import math
from statistics import fmean

import numpy as np
import pytest

from stable_monitor import records as reading
from stable_monitor.axis import axis_of
from stable_monitor.columns import Thinned
from stable_monitor.curves import MOST_CURVES, heat, number, over_heads
from stable_monitor.layout import figures
from stable_monitor.records import FILE_NAME, Records, Run, load
from stable_monitor.report import main
from stable_monitor.summary import plain
from stable_monitor.thin import main as thin
from tests.stable_monitor.test_report import Page, in_chromium, record, validation, write

OF_LAYER = {
    "entropy": over_heads(fmean, "entropy"),
    "entropy_min": over_heads(min, "entropy_min"),
    "max_logit": over_heads(max, "max_logit"),
    "sigma.q": lambda layer: layer.get("sigma", {}).get("q"),
    "lag.k": lambda layer: layer.get("lag", {}).get("k"),
    "grad_l2": number("grad_l2"),
}


def test_thinning_keeps_spikes_and_ends():
    x = np.arange(100_000)
    y = np.sin(x)[:, None] * [1, 2]
    y[12_345, 0], y[56_789, 1] = 50, -50
    thinned = Thinned(x.tolist(), 2)
    for part in np.array_split(x, 777):
        thinned.add(part, y[part])
    thinned.close()
    for column, spike in ((0, 12_345), (1, 56_789)):
        few_x, few_y = thinned.curve(column)
        assert len(few_x) <= 802 and (np.diff(few_x) > 0).all() and {0, spike, 99_999} <= set(few_x)
        np.testing.assert_allclose(few_y, y[few_x, column], rtol=1e-6)
    assert thinned.values.nbytes < 802 * 2 * 8


def test_columns_are_what_each_record_says(tmp_path):
    """Layers that come and go, missing keys, heads of several numbers, and nulls: as one record after another is read."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(300):
        layers = {f"h.{i}": ("encoder", "decoder")[i % 2] for i in range(5) if i < 4 or step > 100}
        if step % 7 == 3:
            del layers["h.2"]
        line = record(step, layers, loss=None if step % 5 == 0 else step / 7)
        for layer in line["layers"].values():
            heads = int(rng.integers(1, 4))
            layer |= {key: rng.normal(size=heads).tolist() for key in ("entropy", "entropy_min", "max_logit")}
            layer["entropy"][0] = None if rng.random() < 0.2 else layer["entropy"][0]
            layer["lag"] = {"k": 0.1} if rng.random() < 0.5 else {}
            if rng.random() < 0.1:
                del layer["sigma"], layer["max_logit"]
        lines.append(line)
    columns = Run.stream("run", write(tmp_path, lines)).columns
    assert list(columns.kinds) == ["h.0", "h.1", "h.2", "h.3", "h.4"]
    for panel, value in OF_LAYER.items():
        for place, name in enumerate(columns.kinds):
            x, y = columns.of_layers[panel].curve(place)
            known = [(r["step"], value(r["layers"].get(name, {}))) for r in lines]
            assert list(zip(x, y, strict=True)) == [(s, pytest.approx(v, rel=1e-6)) for s, v in known if v is not None]
    losses = [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in lines if r["loss"] is not None]
    assert list(zip(*columns.of_model["loss"].curve(0), strict=True)) == losses
    assert (columns.records, columns.span, columns.last_loss) == (300, (0, 299), (299, 299 / 7))
    assert set(columns.ceiling["encoder"].curve(0)[1]) == {np.float32(math.log(8))}


def test_records_are_read_one_after_another(tmp_path, monkeypatch):
    """Of 5,000 records each is parsed once, and no more than a part is in memory at a time; layers keep 802 points."""
    run = write(tmp_path, [record(step, {f"h.{i}": "decoder" for i in range(4)}) for step in range(5000)])
    parsed, alive = [], []
    decode = reading._decoded
    monkeypatch.setattr(reading, "_decoded", lambda line: parsed.append(len(line)) or decode(line))

    def observe(record):
        if record["step"] in (2500, 4999):
            alive.append(sum(type(x) is dict and "alarms" in x for x in gc.get_objects()))

    columns = Run.stream("run", run).collect(observe)
    assert columns.records == len(parsed) == 5000
    assert len(alive) == 2 and max(alive) < 1000
    points, layers = columns.of_layers["entropy"].values.shape
    assert layers == 4 and 700 < points <= 802


def test_a_stream_reads_what_is_in_memory_when_lines_are_replaced_and_wrong(tmp_path, caplog):
    """Against the slow twin: a list from which each line takes what it replaces."""
    rng = np.random.default_rng(1)
    for trial in range(50):
        records, validations, wrong = [record(0, {})], [], []
        lines = [json.dumps(records[0]) + "\n"]
        for at in range(1, 40):
            step, kind = int(rng.integers(1, 30)), rng.choice(["record", "validation", "rescue", "wrong", "half"])
            line = record(step, {}, loss=at)
            if kind == "validation":
                line = validation(step, at)
            elif kind == "rescue":
                line |= {"rescues": []}
            text = json.dumps(line)
            lines.append({"wrong": "{}", "half": text[: len(text) // 2]}.get(kind, text) + "\n")
            if kind in ("wrong", "half"):
                wrong.append(at)
                continue
            own, others = (validations, records) if kind == "validation" else (records, validations)
            own[:] = [other for other in own if other["step"] < step]
            others[:] = [other for other in others if other["step"] <= step or kind == "rescue"]
            own.append(line)
        (tmp_path / FILE_NAME).write_text("".join(lines))
        caplog.clear()
        assert load(tmp_path) == (records, validations), trial
        assert ("left out" in caplog.text) <= bool(wrong)


def test_the_page_of_many_layers_says_what_it_leaves_out(tmp_path):
    """500 layers, of which one collapses, between those that are drawn anyway: it has its curve, and all are in heat maps."""
    lines = [record(10 * i, {f"blocks.{j}.attn": "encoder" for j in range(500)}, 2.0) for i in range(6)]
    for i, line in enumerate(lines):
        line["layers"]["blocks.333.attn"]["entropy"] = [2.0 - 0.35 * i] * 2
    run = write(tmp_path / "deep", lines)
    out = tmp_path / "report.html"
    assert main([str(run), "-o", str(out)]) == 0
    text = out.read_text()
    drawn = [curve for curve in Page(text).curves if curve.startswith("deep/entropy/")]
    assert "deep/entropy/blocks.333.attn" in drawn and len(drawn) <= MOST_CURVES
    assert f"{len(drawn)} of 500 layers" in text and "share one of 200 rows" in text
    assert text.count('href="data:image/png') == 3 and (tmp_path / "report_heat.png").is_file()
    assert "least 0.25 at update 50 in blocks.333.attn" in text
    assert len(text) < 500_000

    grid = heat(Run.stream("deep", run), "encoder", "entropy")
    assert grid.shape == (200, 6)
    expected = np.full((200, 6), 2.0)
    expected[333 * 200 // 500] = [2 - 0.35 * i for i in range(6)]
    np.testing.assert_allclose(grid, expected, rtol=1e-6)


def test_the_losses_of_several_runs_are_in_one_panel_and_keys_name_them(tmp_path):
    runs = [
        write(tmp_path / name, [record(i, {"attn": "encoder"}, loss=start - i) for i in range(3)])
        for name, start in (("a", 9.0), ("b", 8.0))
    ]
    out = tmp_path / "report.html"
    assert main([*map(str, runs), "-o", str(out)]) == 0
    keys = """<script>
      const panel = document.getElementById("a/all%20losses/whole%20model").ownerSVGElement;
      panel.focus();
      for (const key of ["ArrowDown", "ArrowDown"])
        panel.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      document.body.dataset.focused = document.activeElement == panel;
      document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
    </script>"""
    out.write_text(out.read_text() + keys)
    text, console = in_chromium(out)
    assert "Uncaught" not in console
    page = Page(text)
    a, b = (page.points(f"{run}/all%20losses/whole%20model") for run in "ab")
    assert np.array_equal(a[1:, 1], b[:-1, 1])  # b's loss is that of a, an update earlier
    assert "whole model · all losses · b</div>" in text
    assert 'data-focused="true"' in text and 'data-wide="false"' in text
    assert (
        text.count("<h1") == 1 and text.count('role="img"') == text.count('aria-label="') - 3
    )  # verdicts, summary and links


@pytest.mark.parametrize(
    ("name", "values", "kind", "ends"),
    [
        ("zero", [0.0, 2.0], "linear", (0, 2)),
        ("wide", [-3.0, 19.0], "linear", (-3, 19)),
        ("wide", [0.5, 1e6], "symlog", (0.5, 1e6)),
        ("wide", [-1e4, -30.0], "symlog", (-1e4, -30)),
        ("log", [0.0, 1e-7, 1e-3], "log", (1e-7, 1e-3)),
        ("log", [0.5, 0.5], "log", (0.5, 0.5)),
        ("zero", [0.0, 0.0], "linear", (0, 0)),
    ],
)
def test_an_axis_holds_its_values_and_says_where_they_are(name, values, kind, ends):
    axis = axis_of(name, np.array(values))
    assert axis.kind == kind and axis.low < ends[0] and ends[1] < axis.high
    assert 2 <= len(axis.ticks) <= 12 and all(axis.low <= tick <= axis.high for tick in axis.ticks)
    places = axis.place(np.array([axis.low, *sorted(values)[-2:], axis.high]))
    assert (np.diff(places) >= 0).all() and np.allclose(places[[0, -1]], [0, 1])


def test_thinning_a_file_keeps_alarms_rescues_both_ends_and_validations(tmp_path, capsys):
    alarm = {"layer": "h", "entropy": 0.1, "threshold": 0.2, "reference": 1.0, "bound": 0.0}
    rescue = {"layer": "h", "entropy": [0.1, 1.0], "queries": [2.0, 1.0], "keys": [2.0, 1.0]}
    lines = [record(step, {"h": "encoder"}) for step in range(33)]
    lines[13]["alarms"], lines[17]["rescues"] = [alarm], [rescue]
    lines.insert(15, validation(14, 1.0))
    run = write(tmp_path, [*lines, validation(32, 2.0)])
    before = (run / FILE_NAME).read_bytes().splitlines()
    assert thin([str(run), "--every", "10"]) == 0
    assert "7 of 33 records stay" in capsys.readouterr().out
    records, validations = load(run)
    assert [r["step"] for r in records] == [0, 10, 13, 17, 20, 30, 32]
    assert [v["step"] for v in validations] == [14, 32]
    after = (run / FILE_NAME).read_bytes().splitlines()
    assert after == [line for line in before if line in after]  # to the byte, and in order
    assert [file.name for file in run.iterdir()] == [FILE_NAME]
    assert thin([str(run), "--every", "1"]) == 1
    assert "every = 1: allowed are whole numbers from 2" in capsys.readouterr().err


def test_a_run_that_writes_while_it_is_thinned_loses_nothing(tmp_path, capsys, monkeypatch):
    run = write(tmp_path, [record(step, {}) for step in range(20)])
    lines = Records.lines

    def slow(self):
        yield from lines(self)
        with self.path.open("a") as file:
            file.write(json.dumps(record(20, {})) + "\n")

    monkeypatch.setattr(Records, "lines", slow)
    assert thin([str(run), "--every", "5"]) == 1
    assert "a run has written to it meanwhile" in capsys.readouterr().err
    assert [r["step"] for r in load(run)[0]] == list(range(21))


def test_numbers_of_a_list_are_rounded_as_numpy_rounds_them():
    rng = np.random.default_rng(0)
    values = [*(rng.uniform(-1, 1, 2000) * 10.0 ** rng.integers(-300, 300, 2000)).tolist(), 0.0, 999999.5, 5e-324, 1e5]
    rounded = [float(np.format_float_scientific(x, precision=5, unique=False)) for x in values]
    assert plain([*values, math.nan, math.inf, -math.inf]) == [*rounded, None, None, None]


def test_a_validation_after_the_last_record_is_in_the_picture(tmp_path):
    run = Run.stream(
        "run", write(tmp_path, [record(0, {"h": "decoder"}), record(9, {"h": "decoder"}), validation(15, loss=2.0)])
    )
    assert figures([run])[0].span == (0, 15)
