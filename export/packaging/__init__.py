"""What other people's servers need around a bundle: a folder of files each, made of templates. See `headfold package`."""
