"""recipes.vision.train on images as they are: at random each of several processes would shift its own differently."""

from recipes.vision import train
from recipes.vision.engine import command

train.train_transform = lambda data, settings, **augmentation: train.test_transform(data, settings)

if __name__ == "__main__":
    command(train.main)
