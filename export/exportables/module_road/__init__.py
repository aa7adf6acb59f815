"""The road of a person's own nn.Module that calls `headfold.plugins.torch.attention`. Needs nothing but torch.

May import its parent's modules."""
