"""`divisi report`: latencies, throughput, memory, drafts and balance, from a running server or from stored metrics.

sources    samples of all processes: scraped now, or the increase over a time that Prometheus has stored
figures    percentiles and the like, of samples
spelling   as text, as JSON, as a page with plots
"""
