"""From images to logits: encoders, clusters of embeddings, classifiers, and the authors' released files."""
