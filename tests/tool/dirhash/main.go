// Prints Hash1 of a folder as Go's module proxy does: the judge of our dirHash.
package main

import (
	"fmt"
	"os"

	"golang.org/x/mod/sumdb/dirhash"
)

func main() {
	sum, err := dirhash.HashDir(os.Args[1], "", dirhash.Hash1)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(sum)
}
