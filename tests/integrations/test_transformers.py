"""transformers: four model families over expert-parallel ranks, compared with unmodified models."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import checkpoints
import harness
import pytest
import torch
import torch.distributed as dist

from moe_triton import UnavailableError, testing
from moe_triton.integrations import transformers as integration

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TRANSPORTS = ("symmetric", "collective")  # windows in shared memory, gloo
DTYPES = (torch.float32, torch.bfloat16)
BATCH, PROMPT, NEW = 4, 10, 8  # prompts, their tokens, tokens to generate

full = pytest.mark.full
families = pytest.mark.parametrize("family", checkpoints.FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).partition(".")[2])
hooks = pytest.mark.parametrize("hook", ["ep_implementation", "experts_implementation"])
transports = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.fixture(scope="module", autouse=True)
def no_root_on_path():
    """Remove the root, whose link `kernels` hides the distribution that transformers looks for.

    The root is on the path of a checkout that is not installed. Ranks inherit the path.
    """
    root = Path(__file__).resolve().parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != root])
        yield


@pytest.fixture(scope="module", autouse=True)
def own_processes():
    """End the ranks, where transformers keeps the groups of its meshes, each with its threads."""
    yield
    testing.close_pool()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint(family)``: the path of its checkpoint, the same values in every run."""

    @functools.cache
    def write(family):
        path = tmp_path_factory.mktemp(family)
        checkpoints.write(family, path)
        return path

    quiet()
    return write


def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load(path, dtype, hook=None, name="moe_triton", *, layout="fsdp"):
    """The model with ``hook`` set to ``name``; unmodified without."""
    quiet()
    options = {}
    if hook == "experts_implementation":
        options[hook] = name
    elif hook == "ep_implementation":
        world = dist.get_world_size()
        options["distributed_config"] = transformers.distributed.DistributedConfig(
            **{f"{layout}_size": world}, ep_size=world, ep_implementation=name
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    return model.eval()


def prompts(ranks=1, rank=0):
    """[BATCH / ranks, PROMPT] this rank's share."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, checkpoints.VOCABULARY, (BATCH, PROMPT), generator=generator)
    return ids[rank::ranks]


@torch.no_grad()
def run(model, ids):
    """Logits of a prefill, and greedy tokens."""
    logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return logits, tokens[:, ids.shape[1] :]


def against_unmodified(ctx, *, path, dtype, hook, quant=None, layout="fsdp"):
    """Largest difference of a logit, their standard deviation, and how many tokens differ."""
    integration.register(quant=quant)
    ranks, rank = (1, 0) if layout == "tp" else (ctx.world_size, ctx.rank)
    ids = prompts(ranks, rank)
    unmodified = load(path, dtype)
    if hook == "experts_implementation":
        unmodified.set_experts_implementation("eager")
    expected, expected_tokens = run(unmodified, ids)
    logits, tokens = run(load(path, dtype, hook, layout=layout), ids)
    integration.close_exchanges()
    return (
        (logits - expected).abs().max().item(),
        expected.std().item(),
        int((tokens != expected_tokens).sum()),
    )


def check_against_unmodified(world_size, transport, dtype, **options):

    def work(ctx):
        return against_unmodified(ctx, dtype=dtype, **options)

    # A matrix product in fp32 depends on the number of its rows, by a few units in the last place.
    # In bf16 it does not on this CPU, so everything must be bit-equal.
    allowed = 1e-5 if dtype == torch.float32 else 0.0
    for difference, spread, wrong_tokens in harness.run_world(transport, world_size, work):
        assert spread > 0.3, "the logits are too flat to tell right from wrong"
        assert difference <= allowed
        assert wrong_tokens == 0


@transports
@hooks
@dtypes
@families
def test_generates_what_the_unmodified_model_does(checkpoint, family, dtype, hook, transport):
    check_against_unmodified(2, transport, dtype, path=checkpoint(family), hook=hook)


@full
@transports
@hooks
@dtypes
@families
def test_generates_what_the_unmodified_model_does_on_four_ranks(
    checkpoint, family, dtype, hook, transport
):
    check_against_unmodified(4, transport, dtype, path=checkpoint(family), hook=hook)


@full
@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_back_ends(checkpoint, backend, monkeypatch):
    testing.close_pool()  # whether Triton interprets is settled when a process imports it
    monkeypatch.setenv("MOE_TRITON_BACKEND", backend)
    path = checkpoint("qwen3_moe")
    check_against_unmodified(2, "symmetric", torch.bfloat16, path=path, hook="ep_implementation")
    testing.close_pool()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=full)])
def test_tp_ranks_send_a_part_of_their_batch_each(checkpoint, world_size):
    # 4 ranks share 4 tokens in a step of generate, so that some rank may get none.
    options = {"hook": "ep_implementation", "layout": "tp"}
    path = checkpoint("qwen3_moe")
    check_against_unmodified(world_size, "symmetric", torch.float32, path=path, **options)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_int8_rows_change_logits_little(checkpoint, family, record_evidence):
    path = checkpoint(family)

    def work(ctx):
        return against_unmodified(
            ctx, path=path, dtype=torch.float32, hook="ep_implementation", quant="int8"
        )

    results = harness.run_world("symmetric", 2, work)
    difference = max(one[0] for one in results)
    spread = min(one[1] for one in results)
    record_evidence(
        "transformers, int8 dispatch",
        f"{family}: a logit differs by at most {difference:.3f}, where logits have standard "
        f"deviation {spread:.3f}",
    )
    assert 0 < difference < 0.1 * spread


def gradients(model, ids):
    """Loss, and gradients by name of the parameter, whole on every rank."""
    loss = model(ids, labels=ids).loss
    loss.backward()
    results = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        results[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return loss.item(), results


def check_gradients(got, expected, allowed):
    """Equal up to ``allowed``, relative to the loss and to the largest element of each gradient."""
    assert got[0] == pytest.approx(expected[0], rel=allowed)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (got[1][name] - gradient).abs().max() / gradient.abs().max()
        assert error <= allowed, name


# In bf16 transformers' exchange and ours round different rows.
GRADIENTS = [
    *((family, "fsdp", torch.float32, 1e-6) for family in checkpoints.FAMILIES),
    ("qwen3_moe", "tp", torch.float32, 1e-6),
    ("qwen3_moe", "fsdp", torch.bfloat16, 4e-2),
    ("mixtral", "fsdp", torch.bfloat16, 4e-2),
]


@pytest.mark.parametrize("transport", ["symmetric", pytest.param("collective", marks=full)])
@pytest.mark.parametrize("family, layout, dtype, allowed", GRADIENTS)
def test_gradients_are_those_of_transformers_own_all_to_all(
    checkpoint, family, layout, dtype, allowed, transport
):
    path = checkpoint(family)

    def work(ctx):
        integration.register()
        ranks, rank = (1, 0) if layout == "tp" else (ctx.world_size, ctx.rank)
        results = {}
        for name in ("moe_triton", "all_to_all"):
            model = load(path, dtype, "ep_implementation", name, layout=layout)
            results[name] = gradients(model, prompts(ranks, rank))
        check_gradients(results["moe_triton"], results["all_to_all"], allowed)
        integration.close_exchanges()

    harness.run_world(transport, 2, work)


@families
def test_gradients_of_ranks_that_share_the_work_add_up(checkpoint, family):
    """A rank has gradients of its experts from all tokens, and of other parameters from its own."""
    path = checkpoint(family)

    def work(ctx):
        integration.register()
        ids = prompts(ctx.world_size, ctx.rank)
        results = {}
        for name in ("moe_triton", "eager"):
            model = load(path, torch.float32, "experts_implementation", name)
            loss, results[name] = gradients(model, ids)
            for gradient in results[name].values():
                dist.all_reduce(gradient)
            results[name] = loss, results[name]
        check_gradients(results["moe_triton"], results["eager"], 3e-6)
        integration.close_exchanges()

    harness.run_world("symmetric", 2, work)


def test_experts_function_inside_another_ep_implementation(checkpoint):
    """Another implementation has exchanged the tokens, so ids are local."""
    path = checkpoint("qwen3_moe")

    def work(ctx):
        integration.register()
        ids = prompts(ctx.world_size, ctx.rank)
        expected, expected_tokens = run(load(path, torch.float32), ids)
        model = load(path, torch.float32, "ep_implementation", "all_to_all")
        model.set_experts_implementation("moe_triton")
        logits, tokens = run(model, ids)
        assert (logits - expected).abs().max() <= 1e-5
        assert torch.equal(tokens, expected_tokens)

    harness.run_world("symmetric", 2, work)


def test_experts_function_on_one_rank_is_eager(checkpoint):
    integration.register()
    model = load(checkpoint("glm4_moe"), torch.bfloat16, "experts_implementation")
    logits, tokens = run(model, prompts())
    model.set_experts_implementation("eager")
    expected, expected_tokens = run(model, prompts())
    assert torch.equal(logits, expected)
    assert torch.equal(tokens, expected_tokens)


class _ExpertsConfig:
    """Small sizes for the constructor of any experts class."""

    _experts_implementation = "moe_triton"
    _SIZES = (
        ("act", "silu"),
        ("num", 4),
        ("expert_count", 4),
        ("intermediate", 24),
        ("hidden", 16),
        ("latent", 16),
    )

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("n_routed_experts", "moe_num_experts"):
            return 4
        return next((size for part, size in self._SIZES if part in name), 0)


def experts_classes():
    """(module, class) of every experts module of the installed transformers, from its source."""
    root = Path(transformers.models.__file__).parent
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", text, re.MULTILINE):
            yield f"{path.parent.name}.{path.stem}", name


# The first two sum in the tokens' dtype, the next two in float32, the last computes in it too.
CLASSES_IN_CI = (
    "MixtralExperts",
    "GptOssExperts",
    "NemotronHExperts",
    "Inkling2Experts",
    "OpenAIPrivacyFilterExperts",
)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "module, name",
    [
        pytest.param(module, name, id=name, marks=() if name in CLASSES_IN_CI else full)
        for module, name in experts_classes()
    ],
)
def test_experts_function_rounds_as_each_class_does(module, name, weight_dtype):
    """Bit for bit in bf16."""
    kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    generator = torch.Generator().manual_seed(0)
    config = _ExpertsConfig()
    experts = kind(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3, generator=generator)
    x = torch.randn(40, experts.down_proj.shape[1:][experts.is_transposed], generator=generator)
    x = x.bfloat16()
    ids = torch.rand(40, 4, generator=generator).argsort(dim=1)[:, :3]
    weights = torch.rand(40, 3, generator=generator).to(weight_dtype)
    integration.register()
    with torch.no_grad():
        out = experts(x, ids, weights)
        config._experts_implementation = "eager"
        expected = experts(x, ids, weights)
    integration.close_exchanges()
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_model_breaks_its_graph_at_the_experts(checkpoint):
    integration.register()
    model = load(checkpoint("qwen3_moe"), torch.float32, "experts_implementation")
    with torch.no_grad():
        expected = model(prompts()).logits
        logits = torch.compile(model, backend="aot_eager")(prompts()).logits
    integration.close_exchanges()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@full
@transports
def test_compiled_ranks_break_their_graphs_at_the_exchange(checkpoint, transport):
    """The hook of ranks that hold a part of the experts: forward and backward as in eager mode."""
    path = checkpoint("qwen3_moe")

    def work(ctx):
        torch._dynamo.reset()
        integration.register()
        ids = prompts(ctx.world_size, ctx.rank)
        expected = gradients(load(path, torch.float32, "ep_implementation"), ids)
        model = load(path, torch.float32, "ep_implementation")
        compiled = torch.compile(model, backend="aot_eager")
        loss = compiled(ids, labels=ids).loss
        loss.backward()
        got = {
            name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None
        }
        check_gradients((loss.item(), got), expected, 3e-6)
        integration.close_exchanges()
        torch._dynamo.reset()

    harness.run_world(transport, 2, work, limit=600.0)


def test_registering_again_changes_nothing_and_names_have_options_of_their_own():
    from transformers.distributed.expert_parallel import EPImplementationInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def entries(name):
        for registry in (EPImplementationInterface(), ALL_EXPERTS_FUNCTIONS):
            entry = registry[name]
            yield entry.func, entry.args, entry.keywords

    integration.register()
    before = [*entries("moe_triton")]
    integration.register("moe_triton_int8", quant="int8")
    integration.register()
    assert [*entries("moe_triton")] == before
    for (function, _, options), (same, _, others) in zip(
        before, entries("moe_triton_int8"), strict=True
    ):
        assert function is same
        assert (options["options"].quant, others["options"].quant) == (None, "int8")


@pytest.mark.parametrize("missing", ["distributed.expert_parallel", "integrations.moe"])
def test_missing_or_old_transformers_is_an_error(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, f"transformers.{missing}", None)
    with pytest.raises(UnavailableError, match=r"register: needs transformers 5\.23 or later"):
        integration.register()


def test_importing_the_integration_does_not_import_transformers(tmp_path):
    code = "import sys, moe_triton.integrations.transformers; print('transformers' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
