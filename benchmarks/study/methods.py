"""The methods of the comparison and the settings of the sweeps, each a named set of changes to one recipe."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """How a row of a table is made.

    Attributes:
        title: For people.
        adapter: Name of the adapter; "recipe" is that of the configuration file, "raw_text" and "real" are no
            adapters, closed forms are fitted, not trained.
        objective: Name of the objective.
        options: Of the objective; those of the configuration file are kept where both name cs_aligner.
        changes: Other options of the run, as `TrainConfig` names them.
        adapter_options: Of the adapter, in place of the recipe's.
        pairs: Part of the pairs that is used.
        unpaired: Rows of the rest that enter without their partners; 1.0 is all of the rest.
        encoder: Needs the text encoder.
        tokens: Needs token states of both sides.
    """

    title: str
    adapter: str = "recipe"
    objective: str = "cs_aligner"
    options: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)
    adapter_options: dict | None = None
    pairs: float = 1.0
    unpaired: float = 0.0
    encoder: bool = False
    tokens: bool = False


DIFFUSION = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 64, "encoder_hid_proj_type": None}

PLAIN = {
    "info_nce_weight": 1.0,
    "cs_weight": 2.0,
    "source_weight": 0.0,
    "regression_weight": 0.0,
    "temperature": 0.07,
    "two_sided": True,
    "bandwidth": 0.5,
    "diagonal": True,
}
"""The paper's objective at one bandwidth, the former default; the paper states neither weights nor bandwidth."""

MIXED = {**PLAIN, "cs_weight": 8.0, "bandwidth": [0.35, 0.5, 1.0]}
"""The paper's objective with the defaults of `CSAlignerLoss`: three bandwidths, from shapes to means."""

CAPTIONS = {
    **PLAIN,
    "two_sided": False,
    "temperature": 0.03,
    "cs_weight": 2.1,
    "source_weight": 2.0,
    "bandwidth": [0.35, 0.5, 1.0],
    "diagonal": False,
}
"""With a contrast against the captions, ECLIPSE's own regulariser: chosen on validation rows for few pairs."""

REGRESSION = {
    **CAPTIONS,
    "info_nce_weight": 0.5,
    "temperature": 0.05,
    "cs_weight": 8.0,
    "source_weight": 0.2,
    "regression_weight": 3.5,
    "regression_rows": "standardized",
}
"""With a squared error: chosen on validation rows for many raw pairs."""

TABLE = {
    "real": Method("real images against others", "real"),
    "raw_text": Method("raw text", "raw_text"),
    "mean_shift": Method("mean shift", "mean_shift"),
    "ridge": Method("ridge", "ridge"),
    "procrustes": Method("Procrustes", "procrustes"),
    "coral": Method("CORAL (closed form)", "coral"),
    "mse": Method("MSE (Projection)", objective="mse"),
    "info_nce": Method("InfoNCE", objective="info_nce"),
    "eclipse": Method("ECLIPSE", objective="eclipse"),
    "eclipse_standardized": Method("ECLIPSE, scaled", objective="eclipse", options={"rows": "standardized"}),
    "mmd": Method("InfoNCE + MMD", objective="mmd", options={"info_nce_weight": 1.0, "weight": 2.0}),
    "sinkhorn": Method("InfoNCE + Sinkhorn", objective="sinkhorn", options={"info_nce_weight": 1.0, "weight": 2.0}),
    "kl": Method("InfoNCE + KL", objective="kl", options={"info_nce_weight": 1.0, "weight": 2.0}),
    "uniform_align": Method("uniform-align", objective="uniform_align"),
    "modgap": Method("ModGap", objective="modgap"),
    "diffusion": Method("diffusion prior, 25 steps", "diffusion", "diffusion", adapter_options=DIFFUSION),
    "cs": Method("CS alone", objective="cs"),
    "default": Method("CS-Aligner, the default"),
    "single": Method("CS-Aligner, 2 CS, one bandwidth", options=PLAIN),
    "captions": Method("CS-Aligner + contrast with captions", options=CAPTIONS),
    "regression": Method("CS-Aligner + squared error", options=REGRESSION),
    "half": Method("CS-Aligner, half the pairs", pairs=0.5),
    "half_unpaired": Method("CS-Aligner, half + unpaired rest", pairs=0.5, unpaired=1.0),
    "tokens": Method(
        "CS-Aligner + tokens",
        options={"token_weight": 0.1},
        changes={"batch_size": 128},
        tokens=True,
    ),
    "lora": Method("CS-Aligner, LoRA", "lora", changes={"batch_size": 128}, adapter_options={}, encoder=True),
}

QUICK = (
    "real",
    "raw_text",
    "mean_shift",
    "ridge",
    "procrustes",
    "eclipse",
    "eclipse_standardized",
    "modgap",
    "default",
)
"""The methods of a first look; those of the first table of the page."""


CHOICE = {
    "raw_text": TABLE["raw_text"],
    "mean_shift": TABLE["mean_shift"],
    "ridge": TABLE["ridge"],
    "procrustes": TABLE["procrustes"],
    "eclipse": TABLE["eclipse"],
    "eclipse_standardized": TABLE["eclipse_standardized"],
    "2 CS, bandwidth 0.5": Method("", options=PLAIN),
    "8 CS, three bandwidths": Method("", options=MIXED),
    "8 CS, bandwidth 0.5": Method("", options={**PLAIN, "cs_weight": 8.0}),
    "8 CS, three bandwidths, no diagonals": Method("", options={**MIXED, "diagonal": False}),
    "8 CS, three bandwidths, 0.5 squared error": Method(
        "", options={**MIXED, "regression_weight": 0.5, "regression_rows": "standardized"}
    ),
    "captions.yaml's": Method("", options=CAPTIONS),
    "regression.yaml's": Method("", options=REGRESSION),
}
"""Between which the default was chosen, on validation rows."""


SWEEPS: dict[str, dict[str, Method]] = {
    "choice": CHOICE,
    "lambda": {f"lambda={w}": Method("", options={"cs_weight": w}) for w in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)},
    "unpaired": {f"unpaired={part}": Method("", pairs=0.1, unpaired=part) for part in (0.0, 0.3, 1.0)},
}
