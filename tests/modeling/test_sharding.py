"""What each rank holds of a model, before and after a forward."""

import pytest
import torch
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import load_model
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.modeling.sharding import RankMeshes, ShardingOptions, shard_model

AXES = ("pp", "dp_replicate", "fsdp", "tp", "efsdp", "ep")


def meshes_of(sizes):
    sizes = {"pp": 1, "dp_replicate": 1, "fsdp": 1, "tp": 1, "ep": 1} | sizes
    return RankMeshes("cpu", **sizes, timeout_s=30)


def places(sizes):
    """This rank's place along each axis, and who shares what with it."""
    import torch.distributed as dist

    meshes = meshes_of(sizes)
    ranks = meshes.sharing_ranks()
    groups = {
        "dense": meshes.dense_mesh.mesh.flatten().tolist(),
        "experts": meshes.expert_mesh.mesh.flatten().tolist(),
        "data": dist.get_process_group_ranks(ranks.data.group),
        "copies": dist.get_process_group_ranks(ranks.experts.group),
    }
    return {axis: meshes.rank(axis) for axis in AXES}, groups


def test_places_of_hsdp_with_expert_parallelism() -> None:
    results = run_on_ranks(4, places, {"dp_replicate": 2, "fsdp": 2, "ep": 2})
    for rank, (place, groups) in enumerate(results):
        copy, share = divmod(rank, 2)
        zeros = {"pp": 0, "tp": 0, "efsdp": 0}
        assert place == zeros | {"dp_replicate": copy, "fsdp": share, "ep": share}
        assert groups["dense"] == [0, 1, 2, 3]
        assert groups["experts"] == [share, share + 2]
        assert groups["data"] == [0, 1, 2, 3]
        assert groups["copies"] == [2 * copy, 2 * copy + 1]


def test_places_of_tensor_parallelism() -> None:
    results = run_on_ranks(4, places, {"fsdp": 2, "tp": 2, "ep": 2})
    for rank, (place, groups) in enumerate(results):
        share, part = divmod(rank, 2)
        zeros = {"pp": 0, "dp_replicate": 0}
        assert place == zeros | {"fsdp": share, "tp": part, "efsdp": share, "ep": part}
        assert groups["dense"] == groups["experts"] == groups["data"] == [part, part + 2]
        assert groups["copies"] == [0, 1, 2, 3]


def held(path, sizes, shards_dense):
    """Numbers of a rank's parameters before a forward and after it, and the logits."""
    meshes = meshes_of(sizes)
    options = ShardingOptions(shards_dense=shards_dense)
    model = load_model(
        open_checkpoint(str(path)),
        device=torch.device("cpu"),
        dtype=torch.float32,
        on_meta=lambda model: shard_model(model, meshes, options) and None,
        show_progress=False,
    )
    before = _num_held(model)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(4, 20)[None]).logits
    return before, _num_held(model), logits


def _num_held(model):
    experts = {layer.experts for layer in find_moe_layers(model)}
    number = {"experts": 0, "layers": 0, "all": 0}
    in_experts = {id(p) for module in experts for p in module.parameters()}
    in_layers = {id(p) for p in model.base_model.layers.parameters()}
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        number["all"] += local.numel()
        number["experts"] += local.numel() if id(parameter) in in_experts else 0
        number["layers"] += local.numel() if id(parameter) in in_layers else 0
    return number


@pytest.mark.parametrize("shards_dense", [True, False])
def test_a_rank_holds_its_share_also_after_a_forward(shards_dense, family_checkpoint) -> None:
    path = family_checkpoint("qwen3_moe")
    whole = load_model(
        open_checkpoint(str(path)),
        device=torch.device("cpu"),
        dtype=torch.float32,
        show_progress=False,
    )
    expected = _num_held(whole)
    with torch.no_grad():
        logits = whole(input_ids=torch.arange(4, 20)[None]).logits
    results = run_on_ranks(2, held, path, {"fsdp": 2}, shards_dense)
    for name in ("experts", "layers", "all") if shards_dense else ("experts",):
        assert sum(before[name] for before, _, _ in results) == expected[name]
    for before, after, got in results:
        assert before["experts"] == expected["experts"] // 2
        # Norm and head stay gathered until the next forward begins; layers do not.
        assert (after["experts"], after["layers"]) == (before["experts"], before["layers"])
        torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-5)  # sums in another order
