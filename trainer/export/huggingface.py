"""Our transformer in the layout of Hugging Face: `config.json` and weights under the names of its class there.

    norm=rms,   activation=swiglu, positions=rotary     LlamaForCausalLM
    norm=layer, activation=gelu,   positions=learned    GPT2LMHeadModel

Both pair the halves of rotary vectors, and take the tanh form of GELU, as ours does; GPT-2's linear layers hold the
transpose (`transformers.pytorch_utils.Conv1D`), with query, key and value in one.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from trainer.checkpoint.stored import MODEL, Weights
from trainer.core.errors import UserError
from trainer.export.weights import Output

TARGET = "trainer.models.transformer.Transformer"
SHAPES = {("rms", "swiglu", "rotary"): "llama", ("layer", "gelu", "learned"): "gpt2"}


def layout(model: dict[str, Any], stored: Weights, max_length: int | None) -> tuple[dict[str, Any], list[Output]]:
    """`config.json`, and what goes into the weights.

    `model` is the section of the run's configuration, `max_length` the longest input where that does not say it.
    Raises UserError for a network that has no such layout.
    """
    options = _options(model)
    kind = SHAPES.get((options["norm"], options["activation"], options["positions"]))
    kv_heads = options["kv_heads"] or options["heads"]
    if kind is None or (kind == "gpt2" and kv_heads != options["heads"]):
        raise UserError(
            f"There is no Hugging Face class for norm={options['norm']}, activation={options['activation']}, "
            f"positions={options['positions']}, kv_heads={kv_heads} of {options['heads']} heads.",
            "Use --format=safetensors; Llama's and GPT-2's shapes have one (docs/checkpoints.md).",
        )
    prefix = _prefix(stored)
    vocab_size, dim = stored.shapes[f"{MODEL}{prefix}embedding.weight"][0]
    width, dtype = stored.shapes[f"{MODEL}{prefix}body.0.ffn.up.weight"]
    sizes = {
        "vocab_size": vocab_size,
        "dim": dim,
        "width": width[0],
        "length": options["sequence_length"] or max_length or 2048,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "llama":
        return _llama_config(options, kv_heads, sizes), _llama(prefix, options)
    sizes["length"] = stored.shapes[f"{MODEL}{prefix}positions.weight"][0][0]
    return _gpt2_config(options, sizes), _gpt2(prefix, options, dim, width[0])


def _options(model: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the network, its defaults where the configuration has none."""
    from trainer.models.transformer import Transformer

    if model.get("_target_") != TARGET:
        raise UserError(
            f"{model.get('_target_')} has no Hugging Face layout here; {TARGET} has.",
            "Use --format=safetensors or --format=onnx.",
        )
    parameters = inspect.signature(Transformer).parameters
    return {name: model.get(name, parameter.default) for name, parameter in parameters.items()}


def _prefix(stored: Weights) -> str:
    """Where the network is inside the task."""
    name = next(name for name in stored.shapes if name.endswith("embedding.weight") and name.startswith(MODEL))
    return name.removeprefix(MODEL).removesuffix("embedding.weight")


def _llama_config(options: dict[str, Any], kv_heads: int, sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["dim"],
        "intermediate_size": sizes["width"],
        "num_hidden_layers": options["layers"],
        "num_attention_heads": options["heads"],
        "num_key_value_heads": kv_heads,
        "head_dim": sizes["dim"] // options["heads"],
        "hidden_act": "silu",
        "max_position_embeddings": sizes["length"],
        "rms_norm_eps": options["norm_eps"],
        # the first as transformers 5 reads it, the second as all before did
        "rope_parameters": {"rope_type": "default", "rope_theta": options["rope_theta"]},
        "rope_theta": options["rope_theta"],
        "attention_bias": options["bias"],
        "mlp_bias": options["bias"],
        "tie_word_embeddings": options["tied"],
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": sizes["dtype"],
        "torch_dtype": sizes["dtype"],
    }


def _gpt2_config(options: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": sizes["vocab_size"],
        "n_embd": sizes["dim"],
        "n_inner": sizes["width"],
        "n_layer": options["layers"],
        "n_head": options["heads"],
        "n_positions": sizes["length"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": options["norm_eps"],
        "tie_word_embeddings": options["tied"],
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": sizes["dtype"],
        "torch_dtype": sizes["dtype"],
    }


def _llama(prefix: str, options: dict[str, Any]) -> list[Output]:
    renamed = {"embedding": "model.embed_tokens", "norm": "model.norm"}
    kinds: dict[str, tuple[str, ...]] = {name: ("weight",) for name in renamed}
    if not options["tied"]:
        renamed["head"], kinds["head"] = "lm_head", ("weight",)
    parts = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "ffn.gate": "mlp.gate_proj",
        "ffn.up": "mlp.up_proj",
        "ffn.down": "mlp.down_proj",
    }
    for layer in range(options["layers"]):
        for ours, theirs in parts.items():
            renamed[f"body.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
            has_bias = options["bias"] and not ours.endswith("norm")
            kinds[f"body.{layer}.{ours}"] = ("weight", "bias") if has_bias else ("weight",)
    return [
        Output(f"{theirs}.{kind}", (f"{prefix}{ours}.{kind}",))
        for ours, theirs in renamed.items()
        for kind in kinds[ours]
    ]


def _gpt2(prefix: str, options: dict[str, Any], dim: int, width: int) -> list[Output]:
    found = [
        Output("transformer.wte.weight", (f"{prefix}embedding.weight",)),
        Output("transformer.wpe.weight", (f"{prefix}positions.weight",)),
    ]
    if not options["tied"]:
        found.append(Output("lm_head.weight", (f"{prefix}head.weight",)))
    projections = {
        "attn.c_attn": (("attention.query", "attention.key", "attention.value"), 3 * dim),
        "attn.c_proj": (("attention.out",), dim),
        "mlp.c_fc": (("ffn.up",), width),
        "mlp.c_proj": (("ffn.down",), dim),
    }
    norms = {"ln_1": "attention_norm", "ln_2": "ffn_norm"}
    for layer in range(options["layers"]):
        ours, theirs = f"{prefix}body.{layer}.", f"transformer.h.{layer}."
        for name, norm in norms.items():
            found += [Output(f"{theirs}{name}.{kind}", (f"{ours}{norm}.{kind}",)) for kind in ("weight", "bias")]
        for name, (sources, size) in projections.items():
            found.append(Output(f"{theirs}{name}.weight", tuple(f"{ours}{one}.weight" for one in sources), _transposed))
            # Conv1D always has a bias
            biases = tuple(f"{ours}{one}.bias" for one in sources) if options["bias"] else ()
            found.append(
                Output(f"{theirs}{name}.bias", biases, torch.cat if biases else functools.partial(_zeros, size))
            )
    found += [Output(f"transformer.ln_f.{kind}", (f"{prefix}norm.{kind}",)) for kind in ("weight", "bias")]
    return found


def _transposed(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts).t()


def _zeros(size: int, _: list[torch.Tensor]) -> torch.Tensor:
    return torch.zeros(size)
