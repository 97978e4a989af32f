"""Settings of the named model sizes, deviations from the defaults of `config` only."""

from typing import Any

NAMED_SIZES: dict[str, dict[str, Any]] = {
    # BEiT-L/16 with BERT-base; pruning after the same thirds of the depth as in base.
    "large": {
        "video": {"width": 1024, "depth": 24, "num_heads": 16, "prune_layers": [7, 13, 19]},
        "text": {"cls_id": 101, "mask_id": 103},
    },
    "base": {"text": {"cls_id": 101, "mask_id": 103}},
    "small": {
        "video": {"width": 384, "num_heads": 6},
        "text": {"width": 384, "num_heads": 6, "depth": 8, "fusion_layer": 6, "max_length": 64},
        "multimodal_prune_layers": [6],
    },
    "tiny": {
        "video": {
            "image_size": 96,
            "width": 96,
            "depth": 6,
            "num_heads": 4,
            "drop_path": 0.0,
            "prune_layers": [1, 3],
            "block_size": 12,
            "token_order": "zcurve",
            "layer_scale_init": 1.0,
            "init_std": 0.1,
            "position_init": "motion",
            "position_init_scale": 2.0,
        },
        "text": {
            "vocab_size": 256,
            "width": 96,
            "depth": 3,
            "fusion_layer": 2,
            "num_heads": 4,
            "max_length": 32,
            "dropout": 0.0,
            "init_std": 0.1,
        },
        "joint_width": 64,
        "multimodal_prune_layers": [2],
    },
}
