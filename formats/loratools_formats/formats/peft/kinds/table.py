"""What PEFT stores for its other adapter kinds: tensor names, configuration keys, settings.

Each entry says which tensors of a module are which part of its delta, which configuration keys the
change depends on, and which have no influence on it. What the parts mean is declared in
`loratools.kinds`. Source: the tuners of peft 0.21.2.
"""

from __future__ import annotations

import math

from loratools_formats.core.peft_facts import frod_category
from loratools_formats.formats.peft.kinds import settings
from loratools_formats.formats.peft.kinds.declaration import PeftKind


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PATTERNS = _keys("rank_pattern alpha_pattern")

PEFT_KINDS: dict[str, PeftKind] = {
    "ADALORA": PeftKind(
        "adalora",
        {".lora_A": "a", ".lora_B": "b", ".lora_E": "e"},
        settings.factors_shape,
        settings.adalora,
        _keys("init_r lora_alpha rank_pattern"),
        _keys(
            "beta1 beta2 deltaT init_lora_weights lora_dropout megatron_core orth_reg_weight "
            "qalora_group_size r target_r tfinal tinit total_step loftq_config eva_config"
        ),
    ),
    "LOHA": PeftKind(
        "loha",
        {f".hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        settings.loha_shape,
        settings.scaled,
        _keys("r alpha"),
        _keys("module_dropout rank_dropout use_effective_conv2d"),
        kernel_of=("t1",),
        patterns=_PATTERNS,
        sizes={"r1": "r", "r2": "r"},
    ),
    "LOKR": PeftKind(
        "lokr",
        {f".lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
        | {".lokr_t2": "w2_t"},
        settings.lokr_shape,
        settings.lokr,
        _keys("r alpha"),
        _keys(
            "module_dropout rank_dropout rank_dropout_scale use_effective_conv2d decompose_both "
            "decompose_factor"
        ),
        kernel_of=("w2", "w2_t"),
        patterns=_PATTERNS,
        sizes={"r1": "r", "r2": "r"},
    ),
    "VERA": PeftKind(
        "vera",
        {".vera_lambda_b": "lambda_b", ".vera_lambda_d": "lambda_d"},
        lambda m: (m.side("lambda_b", 0), None),
        settings.vera,
        _keys("projection_prng_key"),
        _keys("r save_projection vera_dropout d_initial"),
        {"base_model.vera_A": "a", "base_model.vera_B": "b"},
        sizes={"r": "r", "s": "r"},
    ),
    "PVERA": PeftKind(
        "vera",
        {".pvera_lambda_b": "lambda_b", ".pvera_lambda_d": "lambda_d"},
        lambda m: (m.side("lambda_b", 0), None),
        settings.pvera,
        _keys("projection_prng_key sample_at_inference"),
        _keys("r save_projection pvera_dropout d_initial generator_seed"),
        {"base_model.pvera_A": "a", "base_model.pvera_B": "b"},
        sizes={"s": "r"},
    ),
    "VBLORA": PeftKind(
        "vblora",
        {
            ".vblora_logits_A": "logits_a",
            ".vblora_logits_B": "logits_b",
            ".vblora_logits_A_topk_indices": "indices_a",
            ".vblora_logits_B_topk_indices": "indices_b",
            ".vblora_logits_A_topk_weights": "weights_a",
            ".vblora_logits_B_topk_weights": "weights_b",
        },
        settings.vblora_shape,
        lambda values, _: {"topk": values.count("topk")},
        _keys("topk"),
        _keys(
            "r num_vectors vector_length vblora_dropout init_logits_std init_vector_bank_bound "
            "save_only_topk_weights"
        ),
        {"base_model.vblora_vector_bank": "bank"},
        sizes={"r": "r", "h": "num_vectors", "length": "vector_length"},
    ),
    "UNILORA": PeftKind(
        "unilora",
        {
            f".unilora_{name}_{side}": f"{part}_{side.lower()}"
            for part, names in (
                ("indices", ("indices", "logits")),  # the second are those of the authors' fork
                ("scales", ("scales", "norm")),
            )
            for name in names
            for side in "AB"
        },
        lambda m: (m.side("indices_b", 0), m.side("indices_a", 1)),
        neutral=_keys(
            "r theta_d_length init_theta_d_bound proj_seed save_indices unilora_dropout "
            "init_logits_std init_vector_bank_bound num_vectors save_only_topk_weights topk "
            "vector_length"
        ),
        shared={
            "base_model.unilora_theta_d": "bank",
            "base_model.unilora_vector_bank": "bank",
        },
        left_to_loader=settings.unilora_left,
        sizes={"r": "r", "n": "theta_d_length"},
    ),
    "TINYLORA": PeftKind(
        "tinylora",
        {".tinylora_A": "a", ".tinylora_B": "b", ".tinylora_P": "p"},
        settings.factors_shape,
        settings.tinylora,
        _keys("projection_seed weight_tying"),
        _keys("r u init_v_bound save_projection tinylora_dropout"),
        {"base_model.tinylora_v.{}": "v.{}"},
        settings_of_all=lambda count: {"count": count},
        takes_embeddings=True,
        sizes={"r": "r", "s": "r", "u": "u"},
    ),
    "DELORA": PeftKind(
        "delora",
        {f".delora_{name}": name.lower() for name in ("A", "B", "lambda", "w_norm")},
        settings.factors_shape,
        neutral=_keys("r delora_lambda lambda_pattern module_dropout"),
        patterns=_keys("rank_pattern"),
        sizes={"r": "r"},
    ),
    "GRALORA": PeftKind(
        "gralora",
        {
            ".gralora_A": "a",
            ".gralora_B": "b",
            ".gralora_A_general.weight": "general_a",
            ".gralora_B_general.weight": "general_b",
        },
        lambda m: (m.side("b", 0) * m.side("b", 2), m.side("a", 0) * m.side("a", 1)),
        settings.gralora,
        _keys("alpha r hybrid_r"),
        _keys("gralora_k gralora_dropout"),
        sizes={"r": "r", "n": "gralora_k", "h": "hybrid_r"},
    ),
    "MISS": PeftKind(
        "miss",
        {".miss_block": "block"},
        settings.miss_shape,
        settings.miss,
        neutral=_keys("r mini_r miss_dropout"),
        variant=settings.miss_variant,
        sizes={"r": "r"},
    ),
    "BONE": PeftKind(
        "miss",
        {".bone_block": "block"},
        settings.miss_shape,
        settings.miss,
        neutral=_keys("r"),
        variant=settings.miss_variant,
        sizes={"r": "r"},
    ),
    "C3A": PeftKind(
        "c3a",
        {".c3a_kernel": "kernel"},
        lambda m: (
            m.side("kernel", 0) * m.side("kernel", 2),
            m.side("kernel", 1) * m.side("kernel", 2),
        ),
        neutral=_keys("block_size block_size_pattern"),
        sizes={"size": "block_size"},
        sizes_vary_by=_keys("block_size_pattern"),
    ),
    "RANDLORA": PeftKind(
        "randlora",
        {f".randlora_{name}": name.lower() for name in ("lambda", "gamma", "A", "B")},
        settings=settings.randlora,
        used=_keys("randlora_alpha projection_prng_key sparse very_sparse"),
        neutral=_keys("r save_projection randlora_dropout"),
        shared={
            f"base_model.{name}_{side}": side.lower()
            for name in ("randlora", "randbasis")
            for side in "AB"
        },
        sizes={"r": "r"},
    ),
    "FOURIERFT": PeftKind(
        "fourierft",
        {".fourierft_spectrum": "spectrum"},
        settings=settings.fourierft,
        used=_keys("random_loc_seed scaling"),
        neutral=_keys("n_frequency n_frequency_pattern"),
        sizes={"n": "n_frequency"},
        sizes_vary_by=_keys("n_frequency_pattern"),
    ),
    "WAVEFT": PeftKind(
        "waveft",
        {".waveft_spectrum": "spectrum"},
        settings=settings.waveft,
        used=_keys("random_loc_seed scaling wavelet_family use_idwt"),
        neutral=_keys("n_frequency n_frequency_pattern proportional_parameters"),
        sizes={"n": "n_frequency"},
        sizes_vary_by=_keys("n_frequency_pattern proportional_parameters"),
    ),
    "SHIRA": PeftKind(
        "sparse",
        {".shira_weight": "values", ".shira_indices": "indices"},
        settings=settings.sparse,
        neutral=_keys("r mask_type random_seed"),
    ),
    "SUPERTUNING": PeftKind(
        "sparse",
        {
            ".supertuning_values": "values",
            ".supertuning_indices": "indices",
            ".supertuning_lora_A.weight": "a",
            ".supertuning_lora_B.weight": "b",
        },
        lambda m: (m.side("b", 0), m.side("a", 1)) if "a" in m.parts else (None, None),
        settings.sparse,
        _keys("r lora_alpha"),
        _keys("lora_dropout save_precomputed_indices select_top sparsity"),
        sizes={"r": "r"},
    ),
    "SFT": PeftKind(
        "sparse",
        {".sft_delta.values": "values", ".sft_delta.indices": "indices"},
        settings=settings.sparse,
        neutral=_keys(
            "density num_tunable_weights dtype num_deltas initial_reselection_rate "
            "reselection_rate_exponent selection_algorithm"
        ),
    ),
    "OFT": PeftKind(
        "oft",
        {".oft_R.weight": "triangles", ".oft_embedding_R.weight": "triangles"},
        settings=settings.oft,
        used=_keys("block_share coft eps use_cayley_neumann num_cayley_neumann_terms"),
        neutral=_keys("r oft_block_size module_dropout"),
    ),
    "BOFT": PeftKind(
        "boft",
        {".boft_R": "blocks", ".boft_s": "gain"},
        lambda m: (m.parts["gain"].numel, m.side("blocks", 1) * m.side("blocks", 2)),
        neutral=_keys("boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor"),
        sizes={"levels": "boft_n_butterfly_factor"},
    ),
    "HRA": PeftKind(
        "hra",
        {".hra_u": "u"},
        lambda m: (None, m.side("u", 0)),
        lambda values, _: {"orthogonal": values.flag("apply_GS")},
        _keys("apply_GS"),
        _keys("r"),
        sizes={"r": "r"},
    ),
    "ROAD": PeftKind(
        "road",
        {".road_theta": "theta", ".road_alpha": "alpha"},
        settings=settings.road,
        used=_keys("variant group_size"),
    ),
    "IA3": PeftKind(
        "ia3",
        {".ia3_l": "gain"},
        settings.ia3_shape,
        settings.ia3,
        _keys("feedforward_modules"),
        _keys("init_ia3_weights"),
    ),
    "HIRA": PeftKind(
        "hira",
        {f".hira_{infix}{side}": side.lower() for infix in ("", "embedding_") for side in "AB"},
        lambda m: (m.side("b", 0), math.prod(m.parts["a"].shape[1:])),
        neutral=_keys("r hira_dropout"),
        patterns=_keys("rank_pattern"),
        kernel_of=("a",),
        sizes={"r": "r"},
    ),
    "GLORA": PeftKind(
        "glora",
        {
            f".glora_{path}.{form}": f"{path}.{form}"
            for path in "ABCDE"
            for form in ("Xd", "Xu", "X", "zeros")
        },
        neutral=_keys("r config_A_B config_C config_D_E"),
        sizes={"rA": "r", "rB": "r", "rC": "r"},
    ),
    "DEFT": PeftKind(
        "deft",
        {".deft_P": "p", ".deft_R": "r"},
        lambda m: (m.side("p", 0), m.side("r", 1) if "r" in m.parts else None),
        settings.deft,
        _keys("decomposition_method alpha"),
        _keys("r para init_scale deft_dropout"),
        sizes={"r": "r"},
    ),
    "PSOFT": PeftKind(
        "psoft",
        {
            ".psoft_R.weight": "matrix",
            ".psoft_R.vector_b": "left",
            ".psoft_R.vector_a": "right",
        },
        settings=settings.psoft,
        used=_keys("psoft_svd psoft_orth ab_svd_init cayley_neumann_eps num_cayley_neumann_terms "
              "use_cayley_neumann"),
        neutral=_keys("r psoft_alpha psoft_dropout psoft_mag_a psoft_mag_b psoft_svd_lowrank_niter "
              "random_seed"),
        sizes={"r": "r"},
    ),
    "OSF": PeftKind(
        "osf",
        {f".osf_svd_params.{name}_low": name.lower() for name in "USV"},
        lambda m: (m.side("u", 0), m.side("v", 1)),
        neutral=_keys("effective_rank rank_pattern target_svd_config"),
    ),
    "ADAMSS": PeftKind(
        "adamss",
        {".adamss_A.{}": "a.{}", ".adamss_B.{}": "b.{}", ".adamss_newB": "basis"},
        settings=settings.adamss,
        used=_keys("num_subspaces random_seed"),
        neutral=_keys(
            "r subspace_rank use_dynamic_rank svd_threshold use_asa asa_importance_beta "
            "asa_schedule_exponent asa_target_subspaces asa_uncertainty_beta init_warmup "
            "final_warmup mask_interval"
        ),
    ),
    "PEANUT": PeftKind(
        "peanut",
        {
            ".peanut_A.weight": "a",
            ".peanut_B.weight": "b",
            ".peanut_encoders.{}.weight": "encoder.{}",
            ".peanut_decoders.{}.weight": "decoder.{}",
        },
        lambda m: (m.side("b", 0), None),
        settings.peanut,
        _keys("scaling act_fn depth"),
        _keys("r"),
        sizes={"r": "r"},
    ),
    "BEFT": PeftKind(
        "bias",
        {".beft_bias": "added"},
        lambda m: (m.side("added", 1), None),
    ),
    "TRAINABLE_TOKENS": PeftKind(
        "token_rows",
        {".trainable_tokens_delta": "values"},
        lambda m: (m.side("values", 1), None),
        lambda values, _: {"rows": values.indices("token_indices")},
        _keys("token_indices"),
        layer="embedding",
    ),
    "FROD": PeftKind(
        "frod",
        {".frod_lambda_l": "diagonal", ".frod_lambda_s_values": "sparse"},
        lambda m: (None, m.side("diagonal", 0)),
        neutral=_keys(
            "frod_dropout progressbar projection_prng_key regularization_alpha "
            "runtime_offload_base_weight save_projection sparse_rate"
        ),
        shared={
            "base_model.frod_V.{}": "v",
            "base_model.frod_s_indices.{}": "places",
            "base_model.frod_s_size.{}": "size",
        },
        shared_by=frod_category,
        left_to_loader=settings.frod_left,
    ),
}  # fmt: skip
