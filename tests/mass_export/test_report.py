from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from mass_export.errors import ReportError
from mass_export.report import SECTIONS, render_report, render_report_file
from mass_export.report_files import read_report, write_json, write_text
from mass_export.tables import Table, accuracy_table, percent, routing_table, summary_table

VOID = {"meta", "img", "br", "line", "rect", "polyline"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def scores(joint, known, **more):
    plain = {
        "images": 4,
        "joint_accuracy": joint,
        "reference_accuracy": joint,
        "known_task_accuracy": known,
        "routing_accuracy": 0.75,
        "top_gate_accuracy": 0.75,
        "kept_accuracy": 1.0,
        "mean_tasks_selected": 1.25,
    }
    return plain | more


@pytest.fixture
def report():
    """A report of one suite of two tasks; a class name is markup."""
    router = {"layer": 1, "mode": "topk"}
    layer_choice = [
        {"layer": i, "mode": mode, "routing_accuracy": 0.5, "kept_accuracy": 0.8, "joint_accuracy": 0.25 * i}
        for mode in ("topk", "top1")
        for i in range(3)
    ]
    parity = {"images": 512, "real_images": 496, "logits_max_abs": 2e-5, "residuals_max_rel": 1e-6}
    paper = {
        "description": "The paper's settings.",
        **scores(0.5, 0.75, normalized_joint_accuracy=0.625, normalized_known_task_accuracy=0.9375),
        "tasks": {"pets": scores(0.25, 0.75), "cars": scores(0.75, 0.75)},
        "confusion": [[2, 2], [0, 4]],
        "settings": {"router": router},
        "layer_choice": layer_choice,
        "parity": parity | {"equal_sets": 1.0, "equal_tasks": 1.0, "equal_classes": 1.0},
        "sizes": {"one_model_bytes": 10**6, "bundle_bytes": 3 * 10**6, "all_models_bytes": 2 * 10**6},
        "times": dict.fromkeys(("choose_and_merge_s", "export_s", "verify_s", "classify_s"), 1.0)
        | {"latency_ms": {batch: {"unknown": 2.0, "given": 1.0} for batch in ("1", "32")}},
        "examples": [
            {
                "task": "pets",
                "label": "cat",
                "predicted_task": task,
                "predicted_label": "<b>cat",
                "score": 0.5,
            }
            | {"image": PIXEL}
            for task in ("pets", "cars")
        ],
        "commands": {
            "scores": "mass eval --bundle b",
            "layer_choice": "mass choose-layer",
            "export": "mass export",
        },
    }
    row = {"label": "Base", "known_task_accuracy": 0.4, "normalized_known_task_accuracy": 0.5, "settings": {}}
    core = {
        "tasks": {"pets": 2, "cars": 3},
        "baselines": {"base": row | {"tasks": {"pets": 0.3, "cars": 0.5}}},
        "configurations": ["paper"],
        "paper": paper,
        "curves": {
            "ranks": [
                {"rank_ratio": 1 / 16, "joint": 0.5, "known": 0.7},
                {"rank_ratio": 1 / 8, "joint": 0.6, "known": 0.8},
            ],
            "images_per_task": 60,
            "latency_ms": {batch: {"unknown": 2.0, "given": 1.0} for batch in ("1", "8", "32")},
            "tasks": [{"tasks": 1, "paper": 0.9}, {"tasks": 2, "paper": 0.8}],
            "residuals": {"lead": [[-0.5, 1.0], [0.7, 1.4]], "routed": [[0.25, 0.5], [0.75, 1.0]]},
        },
    }
    versions = {"processor": "CPU", "processors": 2, "memory_gib": 4.0, "system": "Linux", "python": "3.11"}
    machine = versions | {"versions": {"numpy": "2"}}
    return {
        "command": "./scripts/demo",
        "suites": ["core"],
        "core": core,
        "machine": machine,
        "total_time_s": 3.0,
    }


class Page(HTMLParser):
    """Collects tags, attributes and text; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.words = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.sources += [values["src"]] if "src" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_well_formed_and_every_link_leads_to_a_section(report):
    page = Page(render_report(report))
    assert page.ids == list(SECTIONS)
    assert page.links == [f"#{name}" for name in SECTIONS]


def test_the_page_loads_nothing_from_elsewhere(report):
    text = render_report(report)
    assert all(source.startswith("data:") for source in Page(text).sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)


def test_the_page_adapts_to_dark_screens_phones_and_paper(report):
    text = render_report(report)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert 'name="viewport"' in text


def test_text_from_the_data_is_no_markup(report):
    assert "<b><b>cat" not in render_report(report)
    assert "&lt;b&gt;cat" in render_report(report)


def test_every_section_names_the_command_that_made_it(report):
    sections = render_report(report).split("<section ")[1:]
    without = [part.split('"')[1] for part in sections if "<pre>" not in part]
    assert without == ["machine"]


def test_wrong_answers_are_marked_and_corrected(report):
    text = render_report(report)
    assert text.count('class="image wrong"') == 2  # another label; another task
    assert text.count("is cat (pets)") == 2
    report["core"]["paper"]["examples"][0]["predicted_label"] = "cat"
    assert render_report(report).count('class="image wrong"') == 1


def test_without_a_choice_of_the_layer_there_is_no_section_on_it(report):
    del report["core"]["paper"]["layer_choice"]
    assert "layers" not in Page(render_report(report)).ids


def test_the_summary_has_a_row_for_each_baseline_and_two_for_each_configuration(report):
    table = summary_table(report)
    assert [row[:2] for row in table.rows] == [
        ("Base", "given"),
        ("MASS `paper`", "given"),
        ("MASS `paper`", "unknown"),
    ]
    assert table.rows[-1][2:] == ("50.0%", "62.5%", "75.0%")
    assert table.columns[2] == "Core eight"


def test_the_accuracy_table_ends_with_the_average_and_its_share_of_fine_tuned(report):
    core = report["core"]
    table = accuracy_table(core["paper"], core["baselines"])
    assert table.rows[0] == ("pets", "30.0%", "75.0%", "25.0%", "25.0%")
    assert table.rows[-1] == ("Of fine-tuned", "50.0%", "93.8%", "62.5%", "-")
    assert accuracy_table(core["paper"], None).rows[-1] == ("Average", "75.0%", "50.0%", "50.0%")


def test_the_routing_table_shows_sets(report):
    assert routing_table(report["core"]["paper"]).rows[-1] == (
        "Average",
        "75.0%",
        "75.0%",
        "100.0%",
        "1.25",
        "0.0%",
    )


def test_markdown_columns_are_aligned_for_readers_of_the_text():
    table = Table("t", ("", "x"), (("a row", "1.0%"), ("b", "100.0%")))
    assert table.to_markdown().splitlines() == [
        "|       |      x |",
        "| ----- | -----: |",
        "| a row |   1.0% |",
        "| b     | 100.0% |",
    ]
    assert percent(None) == "-"


def test_a_report_file_is_read_back(report, tmp_path):
    write_json(tmp_path / "new" / "report.json", report)
    assert read_report(tmp_path / "new" / "report.json") == report
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"suites": []}', '{"suites": ["core"]}', "\x00", "[" * 100000]
)
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"report\.json"):
        read_report(path)


def test_a_missing_report_is_named(tmp_path):
    with pytest.raises(ReportError, match="no such file"):
        read_report(tmp_path / "report.json")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        write_text(tmp_path / "file" / "report.html", "")


def test_numbers_in_the_page_are_those_of_the_report(report):
    text = render_report(json.loads(json.dumps(report)))
    for figure in ("62.5%", "2.0e-05", "3.0 MB", "layer 1 with topk gates"):
        assert figure in text


def test_curves_show_their_values_at_the_places_that_were_measured(report):
    text = render_report(report)
    curves = text.split('id="curves"')[1].split("<section ")[0]
    assert "1/16" in curves
    assert curves.count("<polyline") == 3
    for shown in ("task unknown: 50.0%", "task given: 80.0%", "paper, task unknown: 90.0%"):
        assert shown in curves


def test_residuals_are_shaded_from_weakest_to_strongest(report):
    text = render_report(report).split('id="residuals"')[1].split("<section ")[0]
    shades = [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', text)]
    assert (min(shades[:4]), max(shades[:4])) == (0.05, 1.0)
    assert ">-0.5<" in text
    assert ">1.4<" in text


def test_a_report_without_curves_has_no_such_sections(report):
    del report["core"]["curves"]
    page = Page(render_report(report))
    assert page.ids == [name for name in SECTIONS if name not in ("curves", "residuals")]


def test_latency_is_drawn_by_batch_for_the_default(report):
    report["core"]["configurations"] = ["default"]
    report["core"]["default"] = report["core"].pop("paper")
    times = render_report(report).split('id="times"')[1].split("<section ")[0]
    assert times.count("<polyline") == 2
    assert "task given: 1 ms" in times


def test_a_file_that_is_no_whole_report_is_one_error(report, tmp_path):
    del report["command"]
    write_json(tmp_path / "results.json", report)
    with pytest.raises(ReportError, match=r"results\.json: not a whole report \(KeyError: 'command'\)"):
        render_report_file(tmp_path / "results.json")
