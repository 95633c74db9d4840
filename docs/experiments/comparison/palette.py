"""What all figures share: a colour a kind of S2, the style of a page, short names of places, and how one is saved.

The four kinds of S2 differ in lightness by 10 or more (CIELAB), for prints in grey and colour-blind readers.
"""

import io
import re

KINDS = {"bitfit": "BitFit", "lnfit": "LNFit", "lora": "LoRA", "adapter_lr": "Adapter-LR",
         "serial": "serial", "parallel": "parallel", "prefix": "prefix"}
COLOUR = {"bitfit": "#e97214", "lnfit": "#3d0a52", "lora": "#0044c0", "adapter_lr": "#00875f"}
INK, SOFT, PALE, BLUE, ORANGE = "#1f2328", "#6e7781", "#e4e4e4", COLOUR["lora"], COLOUR["bitfit"]
WIDTH = 8.3                                   # inches: at 100 dots an inch the width of a page on GitHub
STYLE = {"font.size": 9, "figure.titlesize": 9, "axes.titlesize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
         "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white",
         "legend.frameon": False, "axes.edgecolor": SOFT, "text.color": INK, "axes.labelcolor": INK}
NAMES = {  # of places, per family
    "SelfAttention": "attn", "DenseReluDense": "ffn", "attention.output.dense": "o", "intermediate.dense": "wi",
    "output.dense": "wo", "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
    "attention.output.LayerNorm": "n1", "output.LayerNorm": "n2", "attention.self": "attn", "embeddings": "n0",
    "input_layernorm": "n1", "post_attention_layernorm": "n2", "self_attn.q_proj": "q", "self_attn.k_proj": "k",
    "self_attn.v_proj": "v", "self_attn.o_proj": "o", "mlp.gate_proj": "gate", "mlp.up_proj": "up",
    "mlp.down_proj": "down", "self_attn": "attn", "mlp": "ffn"}
BLOCKS = {"attention.output.dense": "attn", "output.dense": "ffn"}        # of BERT, of kinds that stand after a block


def where(place):
    """(layer, short name, kind) of a place, "encoder.layer.3.output.dense.lora": ("3", "wo", "lora")."""
    name, _, kind = place.rpartition(".")
    t5 = re.fullmatch(r"(encoder|decoder)\.(?:block\.(\d+)\.layer\.(\d)\.)?([\w.]+)", name)
    if t5 and "layer." not in t5[4]:
        layer = f"{t5[1].removesuffix('oder')} {t5[2] or 'end'}"
        norm = f"n{t5[3] or 0}"
        last = t5[4].rpartition(".")[2]
        return layer, norm if last.endswith("layer_norm") else NAMES.get(last, last), kind
    if name == "norm":                                              # a Llama's, after its layers
        return "last", "n1", kind
    found = re.fullmatch(r"(?:.*\.)?layers?\.(\d+)\.(.*)", name)
    layer, path = found.groups() if found else ("emb", name.removesuffix(".LayerNorm"))
    block = BLOCKS.get(path) if kind in ("adapter_lr", "serial", "parallel") else None
    return layer, block or NAMES.get(path, path.rpartition(".")[2]), kind


def save(figure, path):
    """A figure as a small PNG, at twice the width of a page or nearly so."""
    from PIL import Image
    figure.savefig(drawn := io.BytesIO(), dpi=160)
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
