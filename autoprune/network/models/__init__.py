"""Models: the zoo, torchvision's, and weights on disk."""
