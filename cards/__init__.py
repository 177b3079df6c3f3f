"""Paper sheets, one a component, and the templates of the model cards."""
