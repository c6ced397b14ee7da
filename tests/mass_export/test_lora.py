"""LoRA adapters: factors without the full delta, equal to the model with the adapter merged in."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mass_export.errors import (
    CheckpointFormatError,
    CheckpointKeyError,
    CheckpointShapeError,
    CheckpointValueError,
    RecipeError,
)
from mass_export.lora import adapted_tower, load_adapter
from mass_export.merge import merge
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.task_factors import open_task_vector, router_bases

QUIET = Progress(quiet=True)
PREFIX = "base_model.model.vision_model."
SIDES = {  # D_out, D_in of the pico tower's modules
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 32),
    "self_attn.v_proj": (32, 32),
    "self_attn.out_proj": (32, 32),
    "mlp.fc1": (64, 32),
    "mlp.fc2": (32, 64),
}
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj.weight",
    "mlp.fc1": "mlp.c_fc.weight",
    "mlp.fc2": "mlp.c_proj.weight",
}


@pytest.fixture
def write_adapter(tmp_path):
    """`write_adapter(modules, rank=2, config={}, extra={})`: a PEFT folder, and the scaled products by module."""

    def write(modules=None, rank=2, config=None, extra=None, layers=range(3), folder="adapter"):
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "fan_in_fan_out": False}
        settings |= config or {}
        scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        generator = torch.Generator().manual_seed(11)
        tensors, products = dict(extra or {}), {}
        for layer in layers:
            for module in modules or SIDES:
                rows, columns = SIDES[module]
                name = f"encoder.layers.{layer}.{module}"
                left = 0.1 * torch.randn(rows, rank, generator=generator)
                right = 0.1 * torch.randn(rank, columns, generator=generator)
                tensors |= {f"{PREFIX}{name}.lora_A.weight": right, f"{PREFIX}{name}.lora_B.weight": left}
                products[name] = scale * left.double() @ right.double()
        path = tmp_path / folder
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(settings))
        save_file(tensors, path / "adapter_model.safetensors")
        return path, products

    return write


def dense(product):
    return product.left @ product.right


def expected_deltas(products, layer=0):
    """open_clip's matrices of one block."""
    block, stem = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
    deltas = {
        block + OPEN_CLIP[module]: products[stem + module]
        for module in OPEN_CLIP
        if stem + module in products
    }
    qkv = [products.get(f"{stem}self_attn.{part}_proj", torch.zeros(32, 32).double()) for part in "qkv"]
    if any(part.any() for part in qkv):
        deltas[f"{block}attn.in_proj_weight"] = torch.cat(qkv)
    return deltas


@pytest.mark.parametrize(
    "modules", [None, ["self_attn.q_proj", "self_attn.v_proj"], ["self_attn.k_proj"], ["mlp.fc1", "mlp.fc2"]]
)
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_alpha": 3}])
def test_products_are_the_scaled_deltas_with_q_k_and_v_in_one(write_adapter, pico_vision, modules, config):
    path, products = write_adapter(modules, config=config)
    loaded = load_adapter(path, pico_vision)
    for layer in range(3):
        for name, delta in expected_deltas(products, layer).items():
            torch.testing.assert_close(dense(loaded[name]), delta, rtol=0, atol=1e-12)
    assert len(loaded) == 3 * len(expected_deltas(products))


def test_alpha_and_rank_patterns_scale_single_modules(write_adapter, pico_vision):
    path, products = write_adapter(
        ["mlp.fc1", "mlp.fc2"], config={"alpha_pattern": {"mlp.fc1": 16, r"layers\.[01]\.mlp\.fc2": 24}}
    )
    loaded = load_adapter(path, pico_vision)
    for layer, fc2 in ((0, 3), (1, 3), (2, 1)):
        for module, factor in (("mlp.fc1", 2), ("mlp.fc2", fc2)):
            name = f"transformer.resblocks.{layer}.{OPEN_CLIP[module]}"
            delta = factor * products[f"encoder.layers.{layer}.{module}"]
            torch.testing.assert_close(dense(loaded[name]), delta, rtol=0, atol=1e-12)


def test_the_projection_is_transposed(write_adapter, pico_vision):
    left, right = torch.randn(16, 2), torch.randn(2, 32)
    extra = {
        "base_model.model.visual_projection.lora_A.weight": right,
        "base_model.model.visual_projection.lora_B.weight": left,
    }
    path, _ = write_adapter(["mlp.fc1"], extra=extra)
    expected = 4 * (left.double() @ right.double()).T
    torch.testing.assert_close(dense(load_adapter(path, pico_vision)["proj"]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("module", ["text_model.encoder.layers.0.mlp.fc1", "text_projection"])
def test_parts_for_the_text_tower_are_left_out(write_adapter, pico_vision, module):
    name = f"base_model.model.{module}.lora_"
    extra = {f"{name}A.weight": torch.ones(2, 16), f"{name}B.weight": torch.ones(64, 2)}
    path, products = write_adapter(["mlp.fc1"], extra=extra)
    loaded = load_adapter(path, pico_vision)
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    torch.testing.assert_close(dense(loaded[name]), expected_deltas(products)[name], rtol=0, atol=1e-12)


def with_adapter(recipe, adapter, task=0):
    data = yaml.safe_load(recipe.read_text())
    del data["tasks"][task]["checkpoint"]
    data["tasks"][task]["adapter"] = str(adapter)
    other = recipe.with_name("adapted.yaml")
    other.write_text(yaml.safe_dump(data))
    return other


@pytest.mark.parametrize("rank", [2, 5])
def test_a_lora_task_equals_the_task_of_its_merged_checkpoint(
    write_adapter, pico_files, pico_tower, pico_vision, rank
):
    recipe = pico_files(tasks=2, rank=rank)
    path, _ = write_adapter()
    tower = adapted_tower(load_adapter(path, pico_vision), pico_tower(0))
    save_file(tower, recipe.parent / "task0.safetensors")
    full = merge(load_recipe(recipe), QUIET)
    adapted = merge(load_recipe(with_adapter(recipe, path)), QUIET)
    for name, matrix in full.tasks[0].matrices.items():
        mine = adapted.tasks[0].matrices[name]
        torch.testing.assert_close(mine.delta(), matrix.delta(), rtol=0, atol=2e-6)
        torch.testing.assert_close(mine.s, matrix.s[: mine.rank], rtol=0, atol=2e-6)
    for name, delta in full.tasks[0].vectors.items():
        assert torch.equal(adapted.tasks[0].vectors[name], delta)
    name = next(iter(full.router_bases[0]))
    bases = full.router_bases[0][name][:2], adapted.router_bases[0][name][:2]
    torch.testing.assert_close(*(basis.T @ basis for basis in bases), rtol=0, atol=1e-5)
    if rank == 2:  # else the checkpoint has triplets of rounding, which take part in the merge of all tasks
        changed = [name for name, matrix in adapted.tasks[0].matrices.items() if matrix.s[-1] > 0]
        for name in changed:
            torch.testing.assert_close(adapted.merged[name], full.merged[name], rtol=0, atol=1e-5)


def test_no_matrix_of_the_full_size_is_made(write_adapter, pico_files, monkeypatch):
    path, _ = write_adapter()
    recipe = load_recipe(with_adapter(pico_files(rank=6), path))
    monkeypatch.setattr("mass_export.task_factors.factorize", lambda *_: pytest.fail("a dense factorisation"))
    base = {name: torch.zeros(shape) for name, shape in recipe.vision.parameter_shapes().items()}
    task_vector = open_task_vector(recipe.tasks[0], recipe, base)
    from mass_export.task_factors import factorize_task, ranks_of

    ranks = ranks_of(recipe.tasks[0], recipe.vision)
    factors = factorize_task(task_vector, ranks, recipe.vision, torch.float32, QUIET, "task")
    assert factors.matrices["transformer.resblocks.0.mlp.c_fc.weight"].rank == 2
    assert factors.matrices["transformer.resblocks.0.attn.in_proj_weight"].rank == 6  # q, k and v have 2 each
    assert router_bases(task_vector, factors, recipe, torch.float32, "task")


REFUSED = {
    "bias": "all",
    "use_dora": True,
    "modules_to_save": ["visual_projection"],
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 2]],
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(write_adapter, pico_vision, key):
    path, _ = write_adapter(config={key: REFUSED[key]})
    with pytest.raises(CheckpointFormatError, match=rf"unsupported settings.*{key}=.*merge_and_unload"):
        load_adapter(path, pico_vision)


def test_other_kinds_of_adapters_and_broken_configs_are_refused(write_adapter, pico_vision):
    path, _ = write_adapter(config={"peft_type": "IA3"})
    with pytest.raises(CheckpointFormatError, match="peft_type LORA, got 'IA3'"):
        load_adapter(path, pico_vision)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointFormatError, match="not a JSON adapter config"):
        load_adapter(path, pico_vision)
    (path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointFormatError, match=r"needs adapter_config\.json and adapter_model"):
        load_adapter(path, pico_vision)


def test_unknown_modules_and_missing_halves_are_all_named(write_adapter, pico_vision):
    extra = {
        f"{PREFIX}encoder.layers.7.mlp.fc1.lora_A.weight": torch.zeros(2, 32),
        f"{PREFIX}embeddings.patch_embedding.lora_A.weight": torch.zeros(2, 3, 8, 8),
        f"{PREFIX}encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(2, 32),
    }
    path, _ = write_adapter(["mlp.fc2"], extra=extra)
    with pytest.raises(CheckpointKeyError) as caught:
        load_adapter(path, pico_vision)
    message = str(caught.value)
    assert "1 missing (transformer.resblocks.0.mlp.c_fc.weight: lora_A or lora_B)" in message
    assert "2 unexpected" in message
    assert "layers.7" in message
    assert "patch_embedding" in message


def test_adapters_of_another_size_and_without_numbers_are_refused(write_adapter, pico_vision):
    name = f"{PREFIX}encoder.layers.0.mlp.fc2.lora_"
    wrong = {f"{name}A.weight": torch.zeros(2, 128), f"{name}B.weight": torch.zeros(32, 2)}
    path, _ = write_adapter(["mlp.fc1"], extra=wrong)
    with pytest.raises(CheckpointShapeError, match=r"lora_A: expected \[2, 64\], got \[2, 128\]"):
        load_adapter(path, pico_vision)
    wrong[f"{name}A.weight"] = torch.full((2, 64), float("nan"))
    path, _ = write_adapter(["mlp.fc1"], extra=wrong, folder="nan")
    with pytest.raises(CheckpointValueError, match="NaN"):
        load_adapter(path, pico_vision)


def test_a_recipe_takes_either_a_checkpoint_or_an_adapter(write_adapter, pico_files):
    path, _ = write_adapter()
    recipe = with_adapter(pico_files(), path)
    assert load_recipe(recipe).tasks[0].is_adapter
    data = yaml.safe_load(recipe.read_text())
    data["tasks"][0]["checkpoint"] = "task0.safetensors"
    recipe.write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match="checkpoint and adapter: give one of them"):
        load_recipe(recipe)
    del data["tasks"][0]["checkpoint"]
    data["tasks"][0]["adapter"] = "task0.safetensors"
    recipe.write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match="expected the folder of an adapter"):
        load_recipe(recipe)
