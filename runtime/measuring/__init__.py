"""How well a bundle predicts: scores of tokens, perplexity of documents, and headfold as a model of lm-eval."""
