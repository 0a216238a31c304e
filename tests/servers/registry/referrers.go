// SPDX-License-Identifier: Apache-2.0

// A real registry with the referrers API: go-containerregistry's, in memory. It listens at the address that is
// its only argument. `crane registry serve` is the same one without that API.
package main

import (
	"log"
	"net/http"
	"os"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	quiet := log.New(os.Stderr, "", 0)
	handler := registry.New(registry.WithReferrersSupport(true), registry.Logger(quiet))
	log.Fatal(http.ListenAndServe(os.Args[1], handler))
}
