"""ratecluster: labels a web-scale image collection without labels."""
