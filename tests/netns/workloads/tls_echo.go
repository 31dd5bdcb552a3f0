// An echo behind TLS: `tls_echo PORT CERTIFICATE KEY`. Garbage is made and collected on the way.
package main

import (
	"crypto/tls"
	"fmt"
	"log"
	"net"
	"os"
	"runtime"
)

func serve(connection net.Conn) {
	defer connection.Close()
	for {
		data := make([]byte, 65536)
		n, err := connection.Read(data)
		if err != nil {
			return
		}
		if _, err := connection.Write(data[:n]); err != nil {
			return
		}
	}
}

func main() {
	pair, err := tls.LoadX509KeyPair(os.Args[2], os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	listener, err := tls.Listen("tcp", "0.0.0.0:"+os.Args[1], config)
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		for {
			runtime.GC()
		}
	}()
	fmt.Println("ready")
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(connection)
	}
}
