"""PyTorch Lightning: mixed precision with gradient clipping, and runs that resume."""

import pytest
import torch
from helpers import changed, snapshot

import apollo_kernels

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]
STEPS = 6


class Net(LightningModule):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12)
        )
        self.options = options
        self.norms = []

    def training_step(self, batch, _):
        return (self.body(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        groups = apollo_kernels.apollo(self, rank=4, update_proj_gap=2, weight_decay=0.1)
        optimizer = apollo_kernels.APOLLOAdamW(groups, lr=1e-2, **self.options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def configure_gradient_clipping(self, optimizer, *given, **options):
        before = norm_of(self)
        super().configure_gradient_clipping(optimizer, *given, **options)
        self.norms.append((before, norm_of(self)))


def norm_of(net):
    return float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]))


def float16():
    """Lightning takes float16 for a GPU alone; its plugin and the scaler do work on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    return MixedPrecision("16-mixed", "cpu", scaler)


PRECISIONS = {
    "32-true": {"precision": "32-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"plugins": float16},
}


def trained(folder, precision, resume=None, clip=0.05, **options):
    """A run of two epochs, which saves itself after each: amid one, Lightning cannot go on."""
    given = {k: v() if callable(v) else v for k, v in PRECISIONS[precision].items()}
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[saving], gradient_clip_val=clip,
        default_root_dir=folder, **given,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rows = 4 * STEPS // 2
    numbers = [torch.randn(rows, side, generator=generator) for side in (8, 12)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*numbers), batch_size=4)
    net = Net(**options)
    trainer.fit(net, loader, ckpt_path=resume)
    return trainer, net


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_clipped_run_resumes_bit_for_bit(tmp_path, precision):
    trainer, net = trained(tmp_path / "whole", precision)
    assert len(net.norms) == STEPS
    middle = tmp_path / "whole" / "epoch=0.ckpt"
    resumed, _ = trained(tmp_path / "resumed", precision, resume=middle)
    (expected,), (found,) = trainer.optimizers, resumed.optimizers
    assert changed(snapshot(expected), snapshot(found)) == set()
    assert all(int(own["step"]) == STEPS for own in found.state.values())
    if precision == "16-mixed":
        scales = [t.precision_plugin.scaler.get_scale() for t in (trainer, resumed)]
        assert scales[0] == scales[1] == 2.0**13


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_gradients_that_are_clipped_have_no_scale(tmp_path, precision):
    """Their norms are those of full precision, within the rounding of the half one."""
    _, net = trained(tmp_path / "mixed", precision)
    _, full = trained(tmp_path / "full", "32-true")
    for (before, after), (expected, _) in zip(net.norms, full.norms, strict=True):
        assert before == pytest.approx(expected, rel=0.02)
        assert after == pytest.approx(0.05, rel=1e-3)


def test_a_fused_step_unscales_and_clips_by_itself(tmp_path):
    options = {"fused": True, "max_grad_norm": 0.05, "clip": None}
    trainer, net = trained(tmp_path / "mixed", "16-mixed", **options)
    _, full = trained(tmp_path / "full", "32-true")
    (optimizer,) = trainer.optimizers
    assert float(optimizer.grad_norm) == pytest.approx(full.norms[-1][0], rel=0.02)
    for p, q in zip(net.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)


def test_lightning_refuses_to_clip_what_a_fused_step_unscales(tmp_path):
    with pytest.raises(RuntimeError, match="APOLLOAdamW, does not allow for gradient clipping"):
        trained(tmp_path, "16-mixed", fused=True)
