// Command backends serves HTTP on ports FIRST.. of an address with net/http, and prints a line for each request that
// came whole: port, method and target.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
)

func main() {
	ip := os.Args[1]
	first, _ := strconv.Atoi(os.Args[2])
	count, _ := strconv.Atoi(os.Args[3])
	for port := first; port < first+count; port++ {
		listener, err := net.Listen("tcp", net.JoinHostPort(ip, strconv.Itoa(port)))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.Copy(io.Discard, r.Body); err == nil {
				fmt.Printf("%d %s %s\n", port, r.Method, r.RequestURI)
			}
			fmt.Fprintf(w, "%s %s", r.Method, r.RequestURI)
		})
		go http.Serve(listener, handler)
	}
	io.Copy(io.Discard, os.Stdin)
}
