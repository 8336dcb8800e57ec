"""How good an adapter is: metrics of embeddings and of pictures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "baselines": ["baseline_metrics", "baseline_predictions", "cross_fitted_predictions"],
        "comparison": ["compare"],
        "config": ["EvaluateConfig"],
        "distances": [
            "TwoSampleTest",
            "centroid_gap",
            "distribution_gap",
            "feature_frechet_distance",
            "frechet_distance",
            "frechet_extrapolated",
            "kernel_distance",
            "mmd_test",
        ],
        "embedding_metrics": [
            "cosine_similarities",
            "effective_rank",
            "embedding_metrics",
            "group_agreement",
            "held_out_metrics",
            "linear_separability",
            "norm_ratios",
            "real_metrics",
        ],
        "evaluate": ["evaluate"],
        "extractors": ["Extractor", "load_extractor"],
        "metrics": ["METRICS", "Metric", "metric"],
        "picture_metrics": ["ConceptRate", "concept_rate"],
        "retrieval": ["Ranks", "image_identities", "retrieval_ranks"],
    },
)
