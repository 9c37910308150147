"""Export of `trainer.models.transformer` in the Hugging Face layout: `config.json`, and weights under its names.

    norm=rms,   activation=swiglu, positions=rotary     LlamaForCausalLM
    norm=layer, activation=gelu,   positions=learned    GPT2LMHeadModel

Like our transformer, Llama rotates pairs from the two halves of a head, and GPT-2 uses the tanh approximation of GELU.
GPT-2's linear layers hold the transposed weight (`transformers.pytorch_utils.Conv1D`), with query, key and value in one
tensor.
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
    """Return the content of `config.json`, and the tensors to write.

    Args:
        model: The section `model` of the run's configuration.
        stored: The weights of the checkpoint.
        max_length: Maximum number of tokens of an input if `model.sequence_length` is not set.

    Raises:
        UserError: If Hugging Face has no class for this network.
    """
    options = _options(model)
    kind = SHAPES.get((options["norm"], options["activation"], options["positions"]))
    kv_heads = options["kv_heads"] or options["heads"]
    if kind is None or (kind == "gpt2" and kv_heads != options["heads"]):
        raise UserError(
            f"There is no Hugging Face class for norm={options['norm']}, activation={options['activation']}, "
            f"positions={options['positions']}, kv_heads={kv_heads} of {options['heads']} heads.",
            "Use --format=safetensors. Networks shaped like Llama or GPT-2 have a class (docs/checkpoints.md).",
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
    """Return the arguments of the network: those of the configuration, else the defaults of its class."""
    from trainer.models.transformer import Transformer

    if model.get("_target_") != TARGET:
        raise UserError(
            f"--format=hf does not support {model.get('_target_')}, only {TARGET} and trainer.models.hf.HuggingFace.",
            "Use --format=safetensors or --format=onnx.",
        )
    parameters = inspect.signature(Transformer).parameters
    return {name: model.get(name, parameter.default) for name, parameter in parameters.items()}


def _prefix(stored: Weights) -> str:
    """Return the prefix of the network's parameters in the state dict of the LightningModule."""
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
        # transformers 5 reads the first, older versions read the second
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
    outputs = [
        Output("transformer.wte.weight", (f"{prefix}embedding.weight",)),
        Output("transformer.wpe.weight", (f"{prefix}positions.weight",)),
    ]
    if not options["tied"]:
        outputs.append(Output("lm_head.weight", (f"{prefix}head.weight",)))
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
            outputs += [Output(f"{theirs}{name}.{kind}", (f"{ours}{norm}.{kind}",)) for kind in ("weight", "bias")]
        for name, (sources, size) in projections.items():
            weights = tuple(f"{ours}{source}.weight" for source in sources)
            outputs.append(Output(f"{theirs}{name}.weight", weights, _transposed))
            # Conv1D always has a bias
            biases = tuple(f"{ours}{source}.bias" for source in sources) if options["bias"] else ()
            make_bias = torch.cat if biases else functools.partial(_zeros, size)
            outputs.append(Output(f"{theirs}{name}.bias", biases, make_bias))
    outputs += [Output(f"transformer.ln_f.{kind}", (f"{prefix}norm.{kind}",)) for kind in ("weight", "bias")]
    return outputs


def _transposed(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts).t()


def _zeros(size: int, _: list[torch.Tensor]) -> torch.Tensor:
    return torch.zeros(size)
