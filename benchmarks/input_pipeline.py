"""In-memory batches with batched augmentation, against torchvision's transforms image by image.

Both sides deliver the same number of augmented CIFAR-shaped training images (random crop with
padding 4, flip, normalize) in batches of 256 in this one process, on one thread.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.side_by_side import finish, medians, parse
from distiller.apputils.augmentation import BATCH_AUGMENTATIONS
from distiller.apputils.data_loaders import LoaderSettings, MemoryLoader
from distiller.apputils.dataset_sources import LabelledImages
from distiller.dataset_facts import DATASET_FACTS


class ImageByImage(Dataset):
    """What torchvision's CIFAR10 class does: an array, a PIL image for each item, transforms."""

    def __init__(self, images: torch.Tensor, mean, std) -> None:
        self.images = images.permute(0, 2, 3, 1).numpy()
        steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), 0


def main() -> None:
    args = parse(__doc__)
    torch.set_num_threads(1)  # two threads wait for each other wherever the machine is shared
    facts = DATASET_FACTS["cifar10"]
    count, repeats = (2_000, 3) if args.quick else (10_000, 7)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    settings = LoaderSettings(
        facts, (3, 32, 32), 256, 0, 0, training=True, portion=1.0, augment=BATCH_AUGMENTATIONS["cifar10"]
    )
    ours = MemoryLoader(LabelledImages(images, labels), settings, torch.arange(count))
    theirs = DataLoader(ImageByImage(images, facts.mean, facts.std), batch_size=256, shuffle=True)
    times = medians({"in memory": lambda: list(ours), "image by image": lambda: list(theirs)}, repeats)
    for name, seconds in times.items():
        print(f"{name}: {count / seconds:,.0f} images/s")
    figures = {"speedup": times["image by image"] / times["in memory"]}
    finish(figures, {"speedup": ("at least", 4.0)})


if __name__ == "__main__":
    main()
