module sluice.dev/conformance/backends

go 1.24
