"""`python -m headfold.export` is `headfold`: what `accelerate launch -m` and `torchrun -m` need."""

from headfold.export.cli import main

if __name__ == "__main__":
    main(prog_name="headfold")
