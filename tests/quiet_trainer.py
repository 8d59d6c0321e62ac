"""A trainer on the CPU that shows nothing and writes only what its callbacks write."""

import lightning as L


def quiet_trainer(tmp_path, **settings):
    return L.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **({"devices": 1, "logger": False} | settings),
    )
