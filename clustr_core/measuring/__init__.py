"""What is measured on finished runs: profiles, rows kept beside the run, accuracies, studies."""
