"""How good an adapter is: metrics of embeddings and of pictures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "embedding_metrics": [
            "baseline_metrics",
            "centroid_gap",
            "cosine_similarities",
            "distribution_gap",
            "effective_rank",
            "embedding_metrics",
            "frechet_distance",
            "image_identities",
            "kernel_distance",
            "norm_ratios",
            "retrieval",
        ],
    },
)
