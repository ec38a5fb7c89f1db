"""The report: its records as a killed and resumed run leaves them, its page in a real browser, its errors."""

import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from stable_monitor.records import FILE_NAME, load, read
from stable_monitor.report import main

PROJECTIONS = ("q", "k", "v", "out")
OF_LAYER = ("entropy", "entropy_min", "max_logit", *(f"sigma.{key}" for key in PROJECTIONS), "grad_l2", "grad_linf")
OF_MODEL = ("loss", "lr", "grad_l2", "grad_linf")


def record(step, layers, entropy=1.0, **changes):
    """All layers (a dict of their kinds) have the same numbers; the two heads differ by 0.2 around the mean entropy."""
    layer = {
        "keys": 8,
        "entropy": [entropy - 0.1, entropy + 0.1],
        "entropy_min": [0.3, 0.2],
        "max_logit": [4.0, 5.1],
        "bound": [0.01, 0.0],
        "sigma": dict.fromkeys(PROJECTIONS, 1.5),
        "grad_l2": 0.1,
        "grad_linf": 0.004,
    }
    named = {name: {"kind": kind, **layer} for name, kind in layers.items()}
    numbers = {"time": 1.7e9, "loss": 2.0, "lr": 1e-3, "grad_l2": 0.8, "grad_linf": 0.02}
    return {"step": step, **numbers, "layers": named, "alarms": []} | changes


def validation(step, loss):
    return {"step": step, "time": 1.7e9, "validation": {"loss": loss, "top1": 50}}


def write(directory, records):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


class Page(HTMLParser):
    """What a page holds: the curves by id, {"d": ..., "style": ...} of their path, and the tables' rows."""

    def __init__(self, text):
        super().__init__()
        self.curves, self.rows, self.ids = {}, [], Counter()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids[attributes["id"]] += 1
        if tag == "path" and "/" in attributes.get("id", ""):
            self.curves[attributes["id"]] = attributes
        elif tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.lasttag in ("td", "th") and data.strip():
            self.rows[-1].append(data)

    def points(self, curve):
        return np.array(re.findall(r"-?[\d.]+", self.curves[curve]["d"]), float).reshape(-1, 2)


def lightness(color):
    color = color.removeprefix("#")
    return sum(int(color[i : i + 2], 16) * weight for i, weight in ((0, 0.299), (2, 0.587), (4, 0.114)))


def in_chromium(page):
    """The page's DOM after its script has run, and the console."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail("REQUIRE_CHROMIUM is set, and there is no chromium")
        pytest.skip("there is no chromium, chromium-browser or google-chrome to open the page in")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run([chromium, *flags, profile, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_browser_shows_every_curve_of_runs_that_differ(tmp_path):
    deep = {f"blocks.{i}.attn": "decoder" for i in range(60)}
    translation = {
        f"{stack}.layers.{i}.{name}": kind
        for stack, name, kind in (
            ("encoder", "self_attn", "encoder"),
            ("decoder", "self_attn", "decoder"),
            ("decoder", "encoder_attn", "cross"),
        )
        for i in range(2)
    }
    alarm = {"layer": "encoder.layers.0.self_attn", "entropy": 0.125, "threshold": 0.4, "reference": 1, "bound": 0.0}
    falling = [1.5, 1.25, 1.0, 0.75, 0.5]
    write(tmp_path / "deep", [record(100 * i, deep, e) for i, e in enumerate(falling, 1)])
    records = [record(100 * i, translation, e) for i, e in enumerate(falling, 1)]
    records[3]["alarms"] = [alarm]
    write(tmp_path / "a <b> σ", records)
    out = tmp_path / "report.html"
    assert main([str(tmp_path / "deep"), str(tmp_path / "a <b> σ"), "-o", str(out)]) == 0
    hover = """<script>
      const over = document.getElementById("deep/entropy/blocks.7.attn");
      const at = over.getPointAtLength(5).matrixTransform(over.getScreenCTM());
      const where = {bubbles: true, clientX: at.x, clientY: at.y};
      over.ownerSVGElement.querySelector("path").dispatchEvent(new PointerEvent("pointermove", where));
    </script>"""
    (tmp_path / "hovered.html").write_text(out.read_text() + hover)
    text, console = in_chromium(tmp_path / "hovered.html")
    assert "Uncaught" not in console
    page = Page(text)

    odd = "a%20%3Cb%3E%20%CF%83"
    expected = {
        f"{run}/{panel}/{layer}"
        for run, layers in (("deep", deep), (odd, translation))
        for panels, names in ((OF_LAYER, layers), (OF_MODEL, ["whole%20model"]))
        for panel in panels
        for layer in names
    }
    assert expected <= page.curves.keys()
    assert max(page.ids.values()) == 1
    assert all(page.points(curve).shape == (5, 2) for curve in expected)

    line, other = page.points("deep/entropy/blocks.59.attn"), page.points(f"{odd}/entropy/decoder.layers.1.self_attn")
    steps = np.diff(line, axis=0)
    assert np.allclose(steps, steps[0], atol=0.11) and (steps > 1).all()  # straight, to the right, and down in SVG
    assert (line == other).all()  # in two panels, on one scale
    ceiling = page.points("deep/ceiling/decoder")[0, 1]
    assert math.isclose((ceiling - line[0, 1]) / steps[0, 1], (1.5 - math.log(8)) / 0.25, abs_tol=0.02)
    shades = [lightness(page.curves[f"deep/entropy/blocks.{i}.attn"]["stroke"]) for i in range(60)]
    assert shades == sorted(shades) and shades[-1] > shades[0] + 100

    least = ["blocks.0.attn: 0.5 nats at 500", "blocks.0.attn: 0.5 nats"]
    assert ["deep", "5", "100 to 500", "2", "not recorded", *least, "none"] in page.rows
    assert ["a <b> σ", "400", "encoder.layers.0.self_attn", "0.125", "0.4"] in page.rows
    assert page.ids[f"{odd}/alarms/encoder"] == 1
    named = re.search(r"blocks.\d+.attn(?= · entropy · deep)", text)[0]  # all curves of the panel coincide
    hot = [curve for curve, path in page.curves.items() if "hot" in path["class"].split()]
    assert sorted(hot) == sorted(f"deep/{panel}/{named}" for panel in OF_LAYER)

    assert not re.findall(r'(?:src|href)="(?!#|data:|report_\w+\.png")[^"]*"', text)  # nothing from elsewhere
    for name in ("loss", "entropy", "entropy_min", "max_logit", "sigma", "gradients"):
        assert (tmp_path / f"report_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_one_record_is_a_mark_and_what_is_null_is_left_out(tmp_path):
    layers = {"attn": "encoder"}
    first, second = (record(step, layers, loss=None, lr=None, grad_linf=None) for step in (1, 2))
    second["layers"]["attn"] |= {
        "entropy": [None, 0.5],
        "entropy_min": [None, None],
        "sigma": {"q": 2.0},
        "grad_l2": 0.0,
    }
    run = write(tmp_path / "run", [first, second])
    assert main([str(run), "-o", str(tmp_path / "two.html")]) == 0
    page = Page((tmp_path / "two.html").read_text())
    assert "Loss and learning rate</h2><p>Not recorded." in (tmp_path / "two.html").read_text()
    assert "run/loss/whole%20model" not in page.curves and not (tmp_path / "two_loss.png").exists()
    points = {panel: len(np.unique(page.points(f"run/{panel}/attn"), axis=0)) for panel in OF_LAYER}
    assert points == dict.fromkeys(OF_LAYER, 2) | dict.fromkeys(["entropy_min", "sigma.k", "sigma.v", "sigma.out"], 1)
    for panel, count in points.items():
        assert ("dot" in page.curves[f"run/{panel}/attn"]["class"]) == (count == 1)


def test_validation_losses_are_drawn_on_the_scale_of_the_training_loss(tmp_path):
    """Records at 0 to 400 with losses 2, 1, 2, 1, 2; validations at 100 and 300 with 2 and 1."""
    lines = [record(100 * i, {"attn": "encoder"}, loss=2.0 - i % 2) for i in range(5)]
    seen = [validation(100, 2.0), validation(300, 1.0)]
    run = write(tmp_path / "run", sorted([*seen, *lines], key=lambda line: line["step"]))
    assert main([str(run), "-o", str(tmp_path / "report.html")]) == 0
    page = Page((tmp_path / "report.html").read_text())
    training, validated = (page.points(f"run/{name}/whole%20model") for name in ("loss", "validation%20loss"))
    assert np.array_equal(validated, [[training[1, 0], training[0, 1]], [training[3, 0], training[1, 1]]])
    assert ["run", "5", "0 to 400", "2", "1", "attn: 1 nats at 0", "attn: 1 nats", "none"] in page.rows


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write(tmp_path / lr / "seed1", [record(1, {"attn": "encoder"})]) for lr in ("low", "high")]
    assert main([*map(str, runs), "-o", str(tmp_path / "report.html")]) == 0
    assert {"low%2Fseed1/entropy/attn", "high%2Fseed1/entropy/attn"} <= Page(
        (tmp_path / "report.html").read_text()
    ).ids.keys()


def test_a_killed_and_resumed_run_is_read(tmp_path, caplog):
    run = write(tmp_path, [record(step, {}, loss=loss) for loss, step in enumerate((10, 20, 30, 40, 20, 30))])
    with (run / FILE_NAME).open("a") as file:
        file.write(json.dumps(record(40, {}))[:50])
    assert [(r["step"], r["loss"]) for r in read(run)] == [(10, 0), (20, 4), (30, 5)]
    assert read(run / FILE_NAME) == read(run)
    with (run / FILE_NAME).open("a") as file:
        file.write("\n" + json.dumps(record(50, {})) + "\n")
    assert [r["step"] for r in read(run)] == [10, 20, 30, 50]
    assert f"{run / FILE_NAME}, line 7: not a record of the monitor; left out" in caplog.text


def test_a_resumed_run_repeats_its_validations(tmp_path):
    """Killed at 35, resumed from 20: what it had found at 20 stays, and what it found later is replaced."""
    lines = [record(10, {}), validation(20, 5.0), record(20, {}), record(30, {}), validation(30, 4.0), record(35, {})]
    run = write(tmp_path, [*lines, record(20, {}), validation(25, 3.0), record(30, {})])
    records, validations = load(run)
    assert [r["step"] for r in records] == [10, 20, 30]
    assert [(v["step"], v["validation"]["loss"]) for v in validations] == [(20, 5.0), (25, 3.0)]
    write(tmp_path, [record(10, {}), {**validation(20, 1.0), "validation": {"loss": "low"}}])
    assert load(run)[1] == []


def test_a_watched_page_is_written_anew_until_ctrl_c(tmp_path, monkeypatch, capsys):
    run, out = write(tmp_path / "run", [record(1, {"attn": "encoder"})]), tmp_path / "report.html"
    pages = []

    def sleep(seconds):
        pages.append((seconds, out.read_text()))
        if len(pages) == 2:
            raise KeyboardInterrupt
        write(run, [record(step, {"attn": "encoder"}) for step in (1, 7)])

    monkeypatch.setattr("time.sleep", sleep)
    assert main([str(run), "-o", str(out), "--watch", "30"]) == 0
    reload = '<meta http-equiv="refresh" content="30">'
    assert all(seconds == 30 and reload in page for seconds, page in pages)
    assert ["1 to 7" in page for _, page in pages] == [False, True]
    assert reload not in out.read_text() and "1 to 7" in out.read_text()
    with pytest.raises(SystemExit):
        main([str(run), "--watch", "0"])
    assert "argument --watch: 0: allowed are whole numbers from 1" in capsys.readouterr().err


def test_a_watched_run_may_begin_later_and_ctrl_c_ends_a_plain_report(tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", str(tmp_path / "report.html")
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt
        if len(naps) == 2:
            write(run, [record(1, {"attn": "encoder"})])

    monkeypatch.setattr("time.sleep", sleep)
    assert main([str(run), "-o", out, "--watch", "5"]) == 0
    assert capsys.readouterr().err.count("no such file") == 1
    monkeypatch.setattr("stable_monitor.report.report", lambda *args, **settings: sleep(0) or naps.clear() or sleep(0))
    monkeypatch.setattr("time.sleep", None)
    with pytest.raises(KeyboardInterrupt):
        naps[:] = [0, 0]
        main([str(run), "-o", out])


def test_runs_of_any_name_and_without_a_loss(tmp_path):
    runs = [write(tmp_path / name, [record(1, {"attn": "encoder"}, loss=None)]) for name in ("_a", "_b")]
    assert main([*map(str, runs), "-o", str(tmp_path / "report.html")]) == 0
    assert "loss of all runs" not in (tmp_path / "report.html").read_text()


def test_what_cannot_be_reported_is_said_in_one_line(tmp_path, capsys):
    good = str(write(tmp_path / "good", [record(1, {"attn": "encoder"})]))
    out, bare = str(tmp_path / "report.html"), tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, expected in (
        ([str(tmp_path / "gone"), "-o", out], f"gone: no such file; a run is a directory that holds {FILE_NAME}"),
        ([str(bare), "-o", out], f"bare/{FILE_NAME}: no such file"),
        ([str(tmp_path / "empty.jsonl"), "-o", out], "empty.jsonl: holds no record"),
        ([good, good, "-o", out], "the same run is given twice"),
        (
            [good, "-o", str(tmp_path / "gone" / "report.html")],
            f"gone/report.html: there is no folder {tmp_path / 'gone'}",
        ),
        ([good, "-o", good], "must end in .html"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
