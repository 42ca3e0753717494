"""What a search writes to MLflow: runs, registered models, notes of the Optuna dashboard."""
