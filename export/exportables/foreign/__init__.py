"""What the roads of decoders that headfold did not write share: hooks that trace them, copies of them, memory of mapped weights."""
