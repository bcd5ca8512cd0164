"""What passes between stages: table schemas, folders of a run, manifests, the table of stages."""
