# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/quality that need no model: bits, groups, rounding, the Pareto front, recipes."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.quality.bits import (
    GGML_BLOCKS,
    ggml_bits,
    group_width,
    grouped_integer_bits,
    mean_bits,
    nf4_bits,
)
from benchmarks.quality.report import BEGIN, END, KeptRows, pareto_front, table, write_report
from benchmarks.quality.rounding import round_to_nearest
from benchmarks.quality.rows import ROWS, largest_pulses
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.pyramid import codebook_size


def test_bits_of_integers_in_groups_count_scale_and_zero_point():
    assert grouped_integer_bits(4, 128) == 4.125
    assert grouped_integer_bits(4, 64) == 4.25
    assert grouped_integer_bits(3, 64, zero_bits=3) == 3 + 19 / 64


def test_bits_of_nf4_are_those_of_the_paper():
    assert nf4_bits(nested_block=None) == 4.5
    assert round(nf4_bits(), 3) == 4.127  # QLoRA: 0.127 bits a parameter


def test_bits_of_ggml_types_agree_with_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    for name, sizes in GGML_BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == sizes
    assert ggml_bits("Q4_K") == 4.5
    assert ggml_bits("Q3_K") == 3.4375


@pytest.mark.parametrize(
    "in_features, wanted, width",
    [(1536, 128, 128), (576, 64, 64), (576, 128, 144), (576, 16, 16), (7, 64, 7)],
)
def test_groups_divide_the_row(in_features, wanted, width):
    assert group_width(in_features, wanted) == width


def test_mean_bits_weighs_modules_by_their_size():
    assert mean_bits([(3, 4.0), (1, 8.0)]) == 5.0
    with pytest.raises(ValueError, match="no weights"):
        mean_bits([])


def test_rounding_is_the_nearest_of_the_grid():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, 3, 16)
    for row in range(4):
        for start in (0, 16):
            group = weight[row, start : start + 16]
            scale = (group.abs().max() / 3.5).half().float()
            grid = torch.arange(-4, 4) * scale
            nearest = grid[(group[:, None] - grid).abs().argmin(dim=1)]
            torch.testing.assert_close(rounded[row, start : start + 16], nearest)


def test_largest_pulses_fill_the_index():
    for group, bits in ((16, 3), (128, 4), (144, 3)):
        pulses = largest_pulses(group, bits)
        assert math.log2(codebook_size(group, pulses)) <= bits * group
        assert math.log2(codebook_size(group, pulses + 1)) > bits * group
    assert largest_pulses(16, 3) == 27
    assert largest_pulses(128, 4) == 386


def _record(key: str, bits: float, kl: float) -> dict:
    return {
        "key": key, "family": "x", "label": key, "bits_per_weight": bits, "kl_divergence": kl,
        "kl_divergence_ci95": [kl, kl], "perplexity": 10.0 + kl, "top1_agreement": 0.5,
        "device": "cpu", "commit": "0123456789",
    }  # fmt: skip


def test_pareto_front_keeps_what_nothing_beats():
    records = [_record("a", 3, 0.3), _record("b", 4, 0.4), _record("c", 4, 0.1), _record("d", 5, 0.1)]
    assert [record["key"] for record in pareto_front(records)] == ["a", "c"]
    assert "**a**" in table(records)
    assert "**b**" not in table(records)
    assert table(records).split("\n")[2].endswith("| 0.500 | cpu 0123456 |")


def test_a_row_of_one_sequence_has_no_interval():
    records = [_record("a", 3, 0.3), _record("b", 4, 0.2) | {"kl_divergence_ci95": None}]
    assert [line.split("|")[3] for line in table(records).split("\n")[2:]] == [
        " 0.3000 (0.300 to 0.300) ",
        " 0.2000 ",
    ]


def test_report_replaces_only_the_table(tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "quality.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_report([_record("a", 3, 0.3)], tmp_path)
    content = page.read_text()
    assert content.startswith("before\n")
    assert content.endswith("after\n")
    assert "old" not in content
    assert "**a**" in content
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_rows_of_several_machines_come_together(tmp_path):
    setting, path = {"model": "m", "texts": ["a", "b"], "tokens": [24, 10, 1024]}, tmp_path / "quality.json"
    kept = KeptRows(path, setting)
    assert kept.rows() == [] and not path.exists()
    kept.add([_record("b", 4, 0.2)], [_record("a", 3, 0.3)])
    again = KeptRows(path, setting)
    again.add([_record("b", 4, 0.1)], [_record("a", 3, 0.9), _record("c", 5, 0.05)])
    found = [(record["key"], record["kl_divergence"]) for record in KeptRows(path, setting).rows()]
    assert found == [("a", 0.3), ("b", 0.1), ("c", 0.05)]
    with pytest.raises(PVQError, match=r"quality\.json has rows of other model and tokens: give"):
        KeptRows(path, {**setting, "model": "n", "tokens": [24, 10, 512]})


def test_the_page_has_the_rows_that_are_kept():
    """Every row is one of the program's, by its label, and the page's table is written from them."""
    docs = Path(__file__).parents[2] / "docs"
    rows = json.loads((docs / "measurements" / "quality.json").read_text())["rows"]
    assert {(row["key"], row["family"], row["label"]) for row in rows} <= {
        (row.key, row.family, row.label) for row in ROWS.values()
    }
    assert f"{BEGIN}\n\n{table(rows)}\n\n{END}" in (docs / "quality.md").read_text()


def test_rows_have_distinct_labels():
    assert len({row.label for row in ROWS.values()}) == len(ROWS)


def _recipe_type():
    """``recipe_type`` without the packages that its file imports."""
    path = Path(__file__).parents[2] / "benchmarks" / "quality" / "peers" / "ggml_job.py"
    pytest.importorskip("gguf")
    spec = importlib.util.spec_from_file_location("ggml_job", path, submodule_search_locations=[])
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module.recipe_type


def test_ggml_recipes_give_more_bits_where_llama_quantize_does():
    recipe_type = _recipe_type()
    down = [recipe_type("Q4_K_M", "down_proj", layer, 32) for layer in range(32)]
    assert down.count("Q6_K") == 16  # what a Q4_K_M file of a model of 32 layers has
    assert recipe_type("Q4_K_M", "q_proj", 0, 32) == "Q4_K"
    assert recipe_type("Q3_K_M", "v_proj", 1, 32) == "Q5_K"
    assert recipe_type("Q3_K_M", "v_proj", 2, 32) == "Q4_K"
    assert recipe_type("IQ3_XXS", "k_proj", 0, 32) == "IQ2_S"
