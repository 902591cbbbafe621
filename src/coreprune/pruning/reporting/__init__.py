"""What pruning did to a model: certificates, the report, and the report as text."""
