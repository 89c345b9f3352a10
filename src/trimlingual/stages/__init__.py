"""One file per verb of the main path, named as the verb: its inputs and settings in, an artefact out."""
