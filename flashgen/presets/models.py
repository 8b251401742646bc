"""The models: data alone. A `config.json` is the one that the named repository on the Hugging Face hub holds.

`window` counts the query itself, as `sliding_window` does in those files: a query sees keys i - window < j <= i.
"""

from __future__ import annotations

import math

from flashgen.presets.base import Layers, Preset

_LLAMA3 = "The Llama 3 Herd of Models (arXiv 2407.21783), table 3"

# YaRN as DeepSeek-V3's config.json sets it (factor 40, mscale_all_dim 1.0): its own code multiplies the scale by the square.
_DEEPSEEK_MSCALE = 0.1 * 1.0 * math.log(40) + 1.0

MODELS: tuple[Preset, ...] = (
    Preset(
        name="llama3-8b",
        dtype="bf16",
        hidden_size=4096,
        seqlen=8192,
        batch=1,
        layers=(Layers(kind="self", count=32, num_heads_q=32, num_heads_kv=8, head_dim=128, causal=True),),
        source=f"{_LLAMA3}: 32 layers, model dimension 4096, 32 heads, 8 key/value heads, FFN dimension 14336 (SwiGLU); vocab_size 128256: its config.json",
        mlp_width=14336, gated=True, vocab=128256,
    ),
    Preset(
        name="llama3-70b",
        dtype="bf16",
        hidden_size=8192,
        seqlen=8192,
        batch=1,
        layers=(Layers(kind="self", count=80, num_heads_q=64, num_heads_kv=8, head_dim=128, causal=True),),
        source=f"{_LLAMA3}: 80 layers, model dimension 8192, 64 heads, 8 key/value heads, FFN dimension 28672 (SwiGLU); vocab_size 128256: its config.json",
        mlp_width=28672, gated=True, vocab=128256,
    ),
    Preset(
        name="mistral-7b",
        dtype="bf16",
        hidden_size=4096,
        seqlen=8192,
        batch=1,
        layers=(Layers(kind="self", count=32, num_heads_q=32, num_heads_kv=8, head_dim=128, causal=True, window=4096),),
        source="Mistral 7B (arXiv 2310.06825), table 1: dim 4096, n_layers 32, head_dim 128, n_heads 32, n_kv_heads 8, "
        "window_size 4096, hidden_dim 14336, vocab_size 32000 (v0.1; v0.2 and later have no window)",
        mlp_width=14336, gated=True, vocab=32000,
    ),
    Preset(
        name="qwen3-8b",
        dtype="bf16",
        hidden_size=4096,
        seqlen=8192,
        batch=1,
        layers=(Layers(kind="self", count=36, num_heads_q=32, num_heads_kv=8, head_dim=128, causal=True),),
        source="config.json of Qwen/Qwen3-8B: num_hidden_layers 36, hidden_size 4096, num_attention_heads 32, "
        "num_key_value_heads 8, head_dim 128, intermediate_size 12288, vocab_size 151936, use_sliding_window false; q and k are normalised before attention",
        mlp_width=12288, gated=True, vocab=151936,
    ),
    Preset(
        name="gemma2-9b",
        dtype="bf16",
        hidden_size=3584,
        seqlen=8192,
        batch=1,
        layers=(
            Layers(
                kind="global", count=21, num_heads_q=16, num_heads_kv=8, head_dim=256, causal=True, softcap=50.0
            ),
            Layers(
                kind="local", count=21, num_heads_q=16, num_heads_kv=8, head_dim=256, causal=True, softcap=50.0,
                window=4096,
            ),
        ),
        source="config.json of google/gemma-2-9b-it: num_hidden_layers 42, hidden_size 3584, num_attention_heads 16, "
        "num_key_value_heads 8, head_dim 256, query_pre_attn_scalar 256 (so 1/sqrt(head_dim)), attn_logit_softcapping 50, intermediate_size 14336, vocab_size 256000, "
        "sliding_window 4096 "
        "in every other layer (Gemma 2, arXiv 2408.00118, section 2)",
        mlp_width=14336, gated=True, vocab=256000,
    ),
    Preset(
        name="gemma3-12b",
        dtype="bf16",
        hidden_size=3840,
        seqlen=8192,
        batch=1,
        layers=(
            Layers(kind="global", count=8, num_heads_q=16, num_heads_kv=8, head_dim=256, causal=True),
            Layers(
                kind="local", count=40, num_heads_q=16, num_heads_kv=8, head_dim=256, causal=True, window=1024
            ),
        ),
        source="config.json of google/gemma-3-12b-it, text_config: num_hidden_layers 48, hidden_size 3840, num_attention_heads 16, "
        "num_key_value_heads 8, head_dim 256, query_pre_attn_scalar 256 (so 1/sqrt(head_dim)), intermediate_size 15360, vocab_size 262208, "
        "sliding_window 1024, sliding_window_pattern 6 "
        "(five local layers, then a global one); q and k are normalised before attention, there is no softcap",
        mlp_width=15360, gated=True, vocab=262208,
    ),
    Preset(
        name="gpt-oss-20b",
        dtype="bf16",
        hidden_size=2880,
        seqlen=8192,
        batch=1,
        layers=(
            Layers(kind="full", count=12, num_heads_q=64, num_heads_kv=8, head_dim=64, causal=True, has_sinks=True),
            Layers(kind="local", count=12, num_heads_q=64, num_heads_kv=8, head_dim=64, causal=True, has_sinks=True, window=128),
        ),
        source="config.json of openai/gpt-oss-20b: num_hidden_layers 24, hidden_size 2880, num_attention_heads 64, "
        "num_key_value_heads 8, head_dim 64, sliding_window 128 in every other layer; sinks: gpt-oss model card "
        "(arXiv 2508.10925), section 2",
    ),
    Preset(
        name="deepseek-v3",
        dtype="bf16",
        hidden_size=7168,
        seqlen=4096,
        batch=1,
        layers=(
            Layers(
                kind="self", count=61, num_heads_q=128, num_heads_kv=128, head_dim=192, head_dim_v=128, causal=True,
                softmax_scale=192**-0.5 * _DEEPSEEK_MSCALE**2,
            ),
        ),
        source="config.json of deepseek-ai/DeepSeek-V3: num_hidden_layers 61, hidden_size 7168, num_attention_heads 128, "
        "qk_nope_head_dim 128 + qk_rope_head_dim 64, v_head_dim 128, rope_scaling factor 40 and mscale_all_dim 1.0; "
        "latent attention with its up-projections done, as in training and prefill (arXiv 2412.19437, section 2.1.1)",
    ),
    Preset(
        name="bert-base",
        dtype="fp16",
        hidden_size=768,
        seqlen=512,
        batch=32,
        layers=(Layers(kind="self", count=12, num_heads_q=12, num_heads_kv=12, head_dim=64),),
        source="BERT (arXiv 1810.04805), section 3: L=12, H=768, A=12, feed-forward size 4H",
        mlp_width=3072,
    ),
    Preset(
        name="minilm-l6",
        dtype="fp32",
        hidden_size=384,
        seqlen=128,
        batch=8,
        layers=(Layers(kind="self", count=6, num_heads_q=12, num_heads_kv=12, head_dim=32),),
        source="config.json of all-MiniLM-L6-v2: hidden_size 384, num_attention_heads 12, 6 layers, intermediate_size 1536, float32",
        mlp_width=1536,
    ),
    Preset(
        name="vit-l-16",
        dtype="fp16",
        hidden_size=1024,
        seqlen=197,
        batch=32,
        layers=(Layers(kind="self", count=24, num_heads_q=16, num_heads_kv=16, head_dim=64),),
        source="An Image is Worth 16x16 Words (arXiv 2010.11929), table 1: ViT-Large, 24 layers, hidden size 1024, MLP size 4096, 16 heads; "
        "224 x 224 pixels are 14 x 14 patches and a class token, 197",
        mlp_width=4096,
    ),
    Preset(
        name="sdxl",
        dtype="fp16",
        hidden_size=1280,
        seqlen=4096,
        batch=2,
        layers=(
            Layers(kind="self-1024", count=60, num_heads_q=20, num_heads_kv=20, head_dim=64, shrink=4),
            Layers(kind="self-4096", count=10, num_heads_q=10, num_heads_kv=10, head_dim=64),
            Layers(kind="cross-1024", count=60, num_heads_q=20, num_heads_kv=20, head_dim=64, shrink=4, seqlen_k=77),
            Layers(kind="cross-4096", count=10, num_heads_q=10, num_heads_kv=10, head_dim=64, seqlen_k=77),
        ),
        source="unet/config.json of stabilityai/stable-diffusion-xl-base-1.0: block_out_channels 320, 640, 1280, attention_head_dim "
        "(the number of heads) 5, 10, 20, transformer_layers_per_block 1, 2, 10, layers_per_block 2, none at the first level "
        "(SDXL, arXiv 2307.01952, table 1). 1024 x 1024 pixels: latent 128 x 128, 64 x 64 tokens at 640 channels in "
        "2 x 2 down + 3 x 2 up = 10 blocks, 32 x 32 at 1280 in 2 x 10 + 10 + 3 x 10 = 60; 77 text tokens; batch 2 for guidance",
    ),
    Preset(
        name="whisper-large-v3",
        dtype="fp16",
        hidden_size=1280,
        seqlen=1500,
        batch=1,
        layers=(
            Layers(kind="encoder", count=32, num_heads_q=20, num_heads_kv=20, head_dim=64),
            Layers(kind="decoder", count=32, num_heads_q=20, num_heads_kv=20, head_dim=64, causal=True, seqlen_q=448, seqlen_k=448),
            Layers(kind="cross", count=32, num_heads_q=20, num_heads_kv=20, head_dim=64, seqlen_q=448),
        ),
        source="config.json of openai/whisper-large-v3: d_model 1280, 32 encoder and 32 decoder layers, 20 heads, "
        "max_source_positions 1500, max_target_positions 448 (Whisper, arXiv 2212.04356, table 1)",
    ),
)  # fmt: skip
